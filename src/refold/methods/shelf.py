"""Every method, a line each: a new one is its file and its line here. The order is that of tables."""

# ruff: noqa: I001
from refold.methods.repadapter import RepAdapter as RepAdapter
from refold.methods.lora import LoRA as LoRA
from refold.methods.dora import DoRA as DoRA
from refold.methods.oft import OFT as OFT
from refold.methods.fact import FacT as FacT
from refold.methods.ssf import SSF as SSF
from refold.methods.adaptformer import AdaptFormer as AdaptFormer
from refold.methods.inplace import BitFit as BitFit
from refold.methods.inplace import LinearProbe as LinearProbe
from refold.methods.inplace import FullFineTune as FullFineTune
