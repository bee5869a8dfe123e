"""FSDP2: a stage's weights, gradients and optimizer state split over the processes, whole where someone looks at them.

Built on ``torch.distributed.fsdp.fully_shard``, directly: Accelerate offers it for accelerators only. Blocks of towers
are gathered one after another, the rest at once; so are blocks of which another module calls parts, which would miss
the gathering (such a module has ``reaches_into_blocks = True``). Scalars (``logit_scale``) stay whole, which FSDP2 asks
for, and so do modules that a stage has set aside. A sharded tensor is a ``DTensor``, split along its first axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch import distributed as dist

from clipgraft import distributed
from clipgraft.errors import InputError

BLOCK = re.compile(r"(^|\.)(resblocks|blocks|layers|layer)\.\d+$")
FOLDER = "shards"
OLDEST = "2.14"
"""The torch that this was tested with: it reaches into FSDP2 to give plain modules back."""


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is. Under ``no_grad``."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole_tensor(x: Tensor) -> Tensor:
    """A sharded tensor, whole on every rank, all of which take part; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def clip_norm(gradients: Sequence[Tensor], *, limit: float) -> Tensor:
    """Scale gradients, sharded and whole ones, so that the norm of all together is ``limit`` at most; the norm, ()."""
    parts = list[Tensor]()
    own, shared = (torch.zeros((), device=local(gradients[0]).device) for _ in range(2))
    for g in gradients:
        part = local(g)
        square = part.float().square().sum()
        own, shared = (own, shared + square) if part is not g else (own + square, shared)
        parts.append(part)
    dist.all_reduce(shared)
    norm: Tensor = (own + shared).sqrt()
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1))
    return norm


def _blocks(step: nn.Module) -> Iterator[nn.Module]:
    """Blocks of towers, outer ones first. None of a module that runs parts of its blocks itself and says so."""
    apart: list[str] = []
    for name, module in step.named_modules():
        if getattr(module, "reaches_into_blocks", False):
            apart.append(f"{name}.")
        if BLOCK.search(name) and not name.startswith(tuple(apart)) and next(module.parameters(), None) is not None:
            yield module


class Shards:
    """``step`` (the wrapped stage) with its weights split over all ranks, in place.

    ``reshard``: a block's weights are freed between forward and backward.
    """

    def __init__(self, step: nn.Module, *, device: torch.device, reshard: bool = True) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if Version(torch.__version__) < Version(OLDEST):
            raise InputError(
                f"distributed.shard needs torch {OLDEST} or later, this is {torch.__version__}; upgrade it"
            )
        self.step, self.reshard = step, reshard
        self._before = dict(step.named_parameters())
        self.single = [p for p in self._before.values() if p.numel() == 1]
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (distributed.world_size(),)),
            "ignored_params": set(self.single),
        }
        self.modules: list[Any] = list(_blocks(step))
        for module in reversed(self.modules):  # inner ones first
            fully_shard(module, reshard_after_forward=reshard, **options)
        fully_shard(step, **options)
        self.modules.append(step)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer that was built before the split the shards; whole parameters get groups of their own."""
        now = {id(p): q for p, q in zip(self._before.values(), self.step.parameters(), strict=True)}
        groups = optimizer.param_groups
        for group in list(groups):
            params = [now[id(p)] for p in group["params"]]
            group["params"] = [p for p in params if hasattr(p, "to_local")]
            groups.append({**group, "params": [p for p in params if not hasattr(p, "to_local")]})
        groups[:] = [group for group in groups if group["params"]]
        self._before = {}

    @torch.no_grad()
    def reduce_single(self) -> None:
        """Average the gradients of the parameters that aren't sharded, as DDP would."""
        trained = [p for p in self.single if p.requires_grad]
        if not trained:
            return
        rows = torch.stack([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(()) for p in trained])
        dist.all_reduce(rows)
        for p, value in zip(trained, rows / distributed.world_size(), strict=True):
            if p.grad is not None:
                p.grad.fill_(value)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are plain tensors in here, and a forward of any part needs no other rank. All ranks take part."""
        self._gather()
        try:
            yield
        finally:
            for module in self.modules:
                module.set_reshard_after_forward(self.reshard and module is not self.step, recurse=False)
            self.modules[-1].reset_iter_state()  # splits, and forgets what ran in here: it may differ between ranks

    def end(self) -> None:
        """Plain modules with plain weights, for good. All ranks take part."""
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
        from torch.distributed.fsdp import fully_shard

        self._gather()
        for module in self.modules:
            state = fully_shard.state(module)  # type: ignore[attr-defined]
            handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
            for group in state._fsdp_param_groups:
                handles += group._module_to_pre_load_state_dict_hook_handle.values()
                handles += [p._post_load_hook_handle for p in group.fsdp_params]
            for handle in handles:
                handle.remove()
            module.__class__ = type(module).__mro__[2]
            for key in (STATE_KEY, REGISTRY_KEY):
                module.__dict__.pop(key, None)

    def _gather(self) -> None:
        from torch.distributed.fsdp import fully_shard

        root = fully_shard.state(self.step)  # type: ignore[attr-defined]
        root._lazy_init()
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
            for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
                # who asks for a state dict in here wants what is there, not the shards
                handles = group._module_to_pre_save_state_dict_hook_handle
                for handle in handles.values():
                    handle.remove()


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every rank writes its parts as safetensors below ``folder`` (torch's distributed checkpoint, no pickle)."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = folder / FOLDER
    path.mkdir(exist_ok=True)
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))


def stored_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and dtype of every tensor that ``write_shards`` wrote."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder / FOLDER)).read_metadata().state_dict_metadata
    return {k: (e.size, e.properties.dtype) for k, e in found.items() if isinstance(e, TensorStorageMetadata)}


def read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill ``into``, whose tensors may be split over any number of ranks. All ranks take part."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(into, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER)))
