"""Frozen weights divided between processes while an epoch trains: FSDP2, asked for by ``accelerate launch``.

A run of adapters keeps nearly all of its weights frozen. These, and only these, are divided with torch's
:func:`~torch.distributed.fsdp.fully_shard`: each process holds its part of them, and gathers the weights of a block for
the moment in which it computes with them. What trains is a few thousandths of the model, stays whole everywhere, and
has its gradients averaged by DistributedDataParallel, as without FSDP. So a run computes the same with and without it,
their checkpoints are the same, and adapters that share parameters between blocks need no exception.

Between two epochs every process has the whole model on its device: evaluations make different numbers of forward passes
on different processes, which gathering weights cannot follow, and files are written from whole weights. Each process
keeps a copy of the frozen weights in main memory, from which they come back bit for bit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.errors import RefoldError

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

__all__ = ["hidden_launch", "read_launch", "sharded"]

_LAUNCH = "accelerate launch"
_USE_FSDP = "ACCELERATE_USE_FSDP"
_NAME_BLOCKS = (
    "Name the class of the backbone's blocks: --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap Block"
)


@contextmanager
def hidden_launch() -> Iterator[None]:
    """Let accelerate prepare DistributedDataParallel inside the block, whatever it was told of FSDP2.

    From here on transformers loads its weights on every process; told of FSDP it would leave all but one with none.

    Raises:
        RefoldError: as :func:`read_launch`.
    """
    if read_launch() is None:
        yield
        return
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    disable_fsdp_ram_efficient_loading()
    told = os.environ.pop(_USE_FSDP)
    try:
        yield
    finally:
        os.environ[_USE_FSDP] = told


def read_launch() -> FullyShardedDataParallelPlugin | None:
    """What ``accelerate launch --use_fsdp --fsdp_version 2`` was told; None without it.

    Raises:
        RefoldError: it was told what is not done here: another engine, FSDP1, or options that would have no effect.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_true(f"ACCELERATE_USE_{engine}"):
            raise RefoldError(
                f"{engine} is not supported",
                where=_LAUNCH,
                remedy="Launch with --multi_gpu, or to divide the frozen weights with --use_fsdp --fsdp_version 2",
            )
    if not _is_true(_USE_FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RefoldError("FSDP1 is not supported", where=_LAUNCH, remedy="Add --fsdp_version 2")
    for option in ("offload_params", "activation_checkpointing"):
        if _is_true(f"FSDP_{option.upper()}"):
            raise RefoldError("is not supported", where=f"{_LAUNCH} --fsdp_{option}", remedy="Leave it out")
    from accelerate import FullyShardedDataParallelPlugin

    try:
        return FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise RefoldError(f"its options of FSDP cannot be read ({error})", where=_LAUNCH) from error


@contextmanager
def sharded(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Divide the frozen weights between the processes inside the block, if the launch asks for it.

    Every process makes the same forward passes inside. Afterwards, also by an exception, every parameter is the object
    it was, whole, with the values it had, and no module keeps a trace.

    Args:
        model: whole, on the accelerator's device; may be inside a DistributedDataParallel.
        accelerator: of :func:`refold.training.inference.start_accelerator`.

    Raises:
        RefoldError: nothing in the model is frozen, no module is what the launch calls a block, or torch cannot divide
            one.
    """
    plugin = read_launch()
    if plugin is None or accelerator.num_processes == 1:
        yield
        return
    places = _divisible(model)
    if not places:
        raise RefoldError(
            "no weight is frozen, and only frozen weights are divided", where=_LAUNCH, remedy="Launch without it"
        )
    blocks = _blocks(model, plugin)
    device = accelerator.device
    traces = [_Traces(module) for module in model.modules()]
    try:
        try:
            _divide(model, blocks, places, plugin, device)
        except (TypeError, ValueError) as error:  # TypeError: before torch 2.7 nothing could be left whole
            raise RefoldError(f"torch cannot divide it ({error})", where=_LAUNCH, remedy=_NAME_BLOCKS) from error
        finally:
            for trace in traces:
                trace.look()
        for _, _, parameter in places:
            parameter.data = parameter.data.cpu()
        yield
    finally:
        for trace in traces:
            trace.remove()
        for module, name, parameter in places:
            parameter.data = parameter.data.to(device)
            module._parameters[name] = parameter


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def _divisible(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The frozen parameters that torch can divide, each with its module and name there.

    Scalars and quantized weights stay whole, and so do parameters with several places, which need not be in one block.
    """
    everywhere = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
    count = Counter(id(parameter) for _, _, parameter in everywhere)
    return [
        (module, name, parameter)
        for module, name, parameter in everywhere
        if not parameter.requires_grad
        and count[id(parameter)] == 1
        and parameter.dim() > 0
        and parameter.is_floating_point()
        and type(parameter.data) is Tensor
    ]


def _blocks(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first; none means those of the whole model are."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    try:
        is_block = fsdp2_prepare_auto_wrap_policy(plugin, model)
    except ValueError as error:
        raise RefoldError(str(error), where=_LAUNCH, remedy=_NAME_BLOCKS) from error
    if is_block is None:
        return []
    found = [module for module in reversed(list(model.modules())) if module is not model and is_block(module)]
    if not found:
        raise RefoldError("no module is a block to divide", where=_LAUNCH, remedy=_NAME_BLOCKS)
    return found


def _divide(
    model: nn.Module,
    blocks: list[nn.Module],
    places: list[tuple[nn.Module, str, nn.Parameter]],
    plugin: FullyShardedDataParallelPlugin,
    device: torch.device,
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = set(model.parameters()) - {parameter for _, _, parameter in places}
    reshard = plugin.reshard_after_forward is True  # FSDP1 has names here
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, ignored_params=whole)


class _Traces:
    """What fully_shard, which cannot be undone, leaves on a module: its class, attributes and hooks.

    Hooks on state dicts come with the first forward pass only, so that all hooks that are new in the end are taken as
    FSDP's: no other ones are registered while an epoch trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.attributes = module, type(module), set(module.__dict__)
        self.hooks = [(hooks, set(hooks)) for hooks in self._hooks()]
        self.added: set[str] = set()

    def _hooks(self) -> list[dict[int, Any]]:
        module = self.module
        return [
            module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks,
            module._state_dict_pre_hooks, module._load_state_dict_pre_hooks,
        ]  # fmt: skip

    def look(self) -> None:
        """See which attributes the module has got."""
        self.added = set(self.module.__dict__) - self.attributes

    def remove(self) -> None:
        from torch.distributed._composable_state import _module_state_mapping  # else it could be divided only once

        _module_state_mapping.pop(self.module, None)
        self.module.__class__ = self.type
        for name in self.added:
            self.module.__dict__.pop(name, None)
        for hooks, before in self.hooks:
            for key in hooks.keys() - before:
                del hooks[key]
