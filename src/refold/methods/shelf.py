"""Every method, a line each: a new one is its file and its line here. The order is that of tables."""

# ruff: noqa: I001
from refold.methods.repadapter import RepAdapter as RepAdapter
from refold.methods.lora import LoRA as LoRA
from refold.methods.dora import DoRA as DoRA
from refold.methods.oft import OFT as OFT
from refold.methods.fact import FacT as FacT
from refold.methods.hydra import Hydra as Hydra
from refold.methods.krona import KronA as KronA
from refold.methods.kadaptation import KAdaptation as KAdaptation
from refold.methods.arc import ARC as ARC
from refold.methods.rlrr import RLRR as RLRR
from refold.methods.glora import GLoRA as GLoRA
from refold.methods.pace import PACE as PACE
from refold.methods.ssf import SSF as SSF
from refold.methods.adapter import Adapter as Adapter
from refold.methods.adaptformer import AdaptFormer as AdaptFormer
from refold.methods.unified import Unified as Unified
from refold.methods.lorand import LoRand as LoRand
from refold.methods.mona import Mona as Mona
from refold.methods.convpass import Convpass as Convpass
from refold.methods.dtl import DTL as DTL
from refold.methods.lst import LST as LST
from refold.methods.e3va import E3VA as E3VA
from refold.methods.st_adapter import STAdapter as STAdapter
from refold.methods.vpt import VPT as VPT
from refold.methods.conv_adapter import ConvAdapter as ConvAdapter
from refold.methods.pro_tuning import ProTuning as ProTuning
from refold.methods.spm import SPM as SPM
from refold.methods.lv_adapter import LVAdapter as LVAdapter
from refold.methods.inplace import BitFit as BitFit
from refold.methods.inplace import LayerNormTune as LayerNormTune
from refold.methods.inplace import Partial as Partial
from refold.methods.inplace import LinearProbe as LinearProbe
from refold.methods.inplace import FullFineTune as FullFineTune
