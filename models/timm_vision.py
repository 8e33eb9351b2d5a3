"""Vision transformers of timm, without a language model.

``tp.load("timm/<name>")`` wraps CLIP, SigLIP, DINOv2, EVA and other plain ViTs, with or without a
CLS token, registers or a pooling head.  Saliency, crop budgets and selections can be studied
without a 7B model.  Images are cut into views as in LLaVA-NeXT.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from timm.data.config import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import LlavaNextImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenprune.adapter import Adapter, image_sizes
from tokenprune.attention import Projections
from tokenprune.errors import UserError, unknown
from tokenprune.facts import ModulePaths, VisionFacts
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.models.checkpoints import reading, unreachable_hub
from tokenprune.models.weights import infinite, integers, refuse_faults
from tokenprune.registry import register_adapter
from tokenprune.texts import first_line

GRID = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""(rows, columns) of crops that an image may be cut into."""


class TimmModel(nn.Module):
    """A timm ViT that encodes the views of images, in place of a Hugging Face model.

    Args:
        vit: The ViT.
        name: Its name in timm.
        grid: (rows, columns) of crops that an image may be cut into.
    """

    def __init__(self, vit: Any, name: str, grid: Sequence[tuple[int, int]] = GRID) -> None:
        super().__init__()
        self.vit = vit
        self.multi_modal_projector = nn.Identity()
        side = vit.patch_embed.img_size[0]
        self.config = SimpleNamespace(
            image_grid_pinpoints=[[rows * side, cols * side] for rows, cols in grid],
            vision_config=SimpleNamespace(
                model_type=name, image_size=side, hidden_size=int(vit.embed_dim)
            ),
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def layout(self, image_size: tuple[int, int]) -> TokenLayout:
        """As `Adapter.layout`: thumbnail and unpadded canvas, no separators."""
        config, shape = self.config, tuple(self.vit.patch_embed.grid_size)
        grid = get_anyres_image_grid_shape(
            image_size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        # Patches need not be square, so the image is measured in the patches of a square view.
        extent = image_size[0] * shape[0], image_size[1] * shape[1]
        box = unpadded_box(extent, (grid[0] * shape[0], grid[1] * shape[1]))
        return TokenLayout.anyres(grid, shape, box, newlines=False)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor
    ) -> BaseModelOutputWithPooling:
        """Packed features (N, D) of every image, from the ViT's ``forward_features``.

        They include the ViT's final norm, except if timm applies it after an average over the
        patches (``fc_norm``).

        Args:
            pixel_values: (images, views, 3, height, width), padded with views of zeros.
            image_sizes: (images, 2) height and width in pixels.

        Raises:
            UserError: The ViT does not return one token per patch.
        """
        layouts = [self.layout((int(height), int(width))) for height, width in image_sizes]
        views = [layout.views for layout in layouts]
        pixels = torch.cat([some[:count] for some, count in zip(pixel_values, views, strict=True)])
        tokens = self.vit.forward_features(pixels)
        patches_of_a_view = math.prod(self.vit.patch_embed.grid_size)
        if tokens.ndim != 3 or tokens.shape[1] != self.vit.num_prefix_tokens + patches_of_a_view:
            raise UserError(
                f"{self.config.vision_config.model_type!r} makes features of shape "
                f"{tuple(tokens.shape[1:])} of a view of {patches_of_a_view} patches; only ViTs "
                "that return one token per patch are supported."
            )
        if getattr(self.vit, "attn_pool", None) is not None:
            self.vit.forward_head(tokens, pre_logits=True)  # its hooks read the pooling head
        patches = self.multi_modal_projector(tokens[:, self.vit.num_prefix_tokens :])
        output = BaseModelOutputWithPooling()
        output.pooler_output = packed(list(patches.split(views)), layouts)  # type: ignore[assignment]
        return output


def packed(values: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
    """For every image the values (N, ...) of its tokens, from values (views, patches, ...)."""
    found = []
    for some, layout in zip(values, layouts, strict=True):
        place = layout.row * layout.view_shape[1] + layout.col
        found.append(some[layout.view.to(some.device), place.to(some.device)])
    return found


@register_adapter("timm")
class TimmVision(Adapter):
    """A vision transformer of timm, without a language model."""

    hosts: ClassVar[tuple[str, ...]] = ("TimmModel",)
    has_language_model: ClassVar[bool] = False
    paths: ClassVar[ModulePaths] = ModulePaths(vision="vit")

    @property
    def base(self) -> Any:
        return self.model

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = self.model.vit.blocks
        return blocks

    def vision_attention(self, layer: int) -> nn.Module:
        return self.vision_layers[layer].get_submodule("attn")

    @property
    def pooling_head(self) -> Any:
        head = getattr(self.model.vit, "attn_pool", None)
        return head if hasattr(head, "latent") else None

    @property
    def view_shape(self) -> tuple[int, int]:
        rows, cols = self.model.vit.patch_embed.grid_size
        return int(rows), int(cols)

    def vision_facts(self) -> VisionFacts:
        vit: Any = self.model.vit
        block = self.vision_layers[0]
        height, width = vit.patch_embed.patch_size
        return VisionFacts(
            model_type=self.model.config.vision_config.model_type,
            layers=len(self.vision_layers),
            hidden=int(vit.embed_dim),
            intermediate=_mlp_width(block),
            heads=int(getattr(block.get_submodule("attn"), "num_heads", 0)),
            view_shape=self.view_shape,
            patch_size=(int(height), int(width)),
            prefix_tokens=int(vit.num_prefix_tokens),
            has_cls=getattr(vit, "cls_token", None) is not None,
            has_head=self.pooling_head is not None,
            readable=all(_is_plain(one.get_submodule("attn")) for one in self.vision_layers),
            reducible=False,
            resizable=False,
        )

    @contextmanager
    def tap(self, layer: int) -> Iterator[Projections]:
        with _operands(self.vision_attention(layer)) as tapped:
            yield tapped

    @contextmanager
    def tap_head(self) -> Iterator[list[Tensor]]:
        rows: list[Tensor] = []
        with _operands(self.pooling_head) as tapped:
            yield rows
            query, key = tapped.split()
            logits = query @ key.transpose(-1, -2) * tapped.scale
            rows.append(logits.softmax(-1).mean((1, 2))[:, -math.prod(self.view_shape) :])

    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        found: TokenLayout = self.model.layout(image_size)
        return found

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        return [self.layout(size) for size in image_sizes(call)]

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        return packed(maps, self.layouts(call, modality))


def _mlp_width(block: nn.Module) -> int:
    """Width of the MLP of a block: rows of its first linear layer, or 0 without one."""
    mlp = getattr(block, "mlp", nn.Identity())
    linears = (one for one in mlp.modules() if isinstance(one, nn.Linear))
    first = next(linears, None)
    return 0 if first is None else first.out_features


def _is_plain(attention: nn.Module) -> bool:
    """Whether ``attention`` is the softmax of query times key, as `Projections` computes it.

    BEiT and ViTs with relative positions add a bias, differential attention subtracts a second map,
    and ConViT mixes the map with positions.
    """
    known = {"Attention", "AttentionRope", "EvaAttention"} & {
        c.__name__ for c in type(attention).__mro__
    }
    return bool(known) and not hasattr(attention, "relative_position_bias_table")


class _Operands(TorchFunctionMode):
    """Record the first query and key that are multiplied, after any norm and rotation."""

    def __init__(self, tapped: Projections) -> None:
        super().__init__()
        self.tapped = tapped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tapped.query is None:
            if func is F.scaled_dot_product_attention:
                if kwargs.get("attn_mask") is not None or (len(args) > 3 and args[3] is not None):
                    raise UserError(
                        "this vision transformer masks its attention, which saliency cannot "
                        "take into account; use a method without saliency, or another model."
                    )
                self._record(args[0], args[1], kwargs.get("scale"))
            elif func in (Tensor.matmul, Tensor.__matmul__) and args[1].ndim == 4:
                self._record(args[0], args[1].transpose(-1, -2), 1.0)  # timm has scaled the query
        return func(*args, **kwargs)

    def _record(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        self.tapped.heads = query.shape[1]
        self.tapped.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.tapped.query, self.tapped.key = (
            part.detach().transpose(1, 2).flatten(2) for part in (query, key)
        )


@contextmanager
def _operands(attention: nn.Module) -> Iterator[Projections]:
    """Record the query and key that ``attention`` multiplies while the context is open.

    Reading the operands of the product covers every variant: fused or separate projections, norms,
    rotary embeddings and grouped keys.
    """
    tapped = Projections(heads=0, scale=1.0)
    modes: list[_Operands] = []

    def enter(module: nn.Module, args: Any) -> None:
        tapped.query = tapped.key = None
        modes.append(_Operands(tapped))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    handles = [
        attention.register_forward_pre_hook(enter),
        attention.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


def load_timm(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    *,
    pretrained: bool | str | Path = False,
    grid: Sequence[tuple[int, int]] = GRID,
    **options: Any,
) -> tuple[TimmVision, SimpleNamespace, Path | None]:
    """Build the parts of a pipeline; users call ``tp.load("timm/<name>", ...)``.

    Args:
        name: Name of the model in timm, with its tag.
        device: As in `tokenprune.load`.
        dtype: As in `tokenprune.load`; ``auto`` is float32.
        pretrained: True downloads timm's weights, a path loads a checkpoint (``.safetensors`` or
            ``.pth``), False leaves them random.  The classifier of a checkpoint is ignored unless
            ``num_classes`` is given.
        grid: (rows, columns) of crops that an image may be cut into.
        **options: For `timm.create_model`, such as ``img_size``.

    Returns:
        The adapter, a processor for images only, and the file of the weights or None.

    Raises:
        UserError: The name is unknown, the model is not a plain ViT, weights cannot be downloaded
            or do not fit, ``grid`` is malformed, or views are not square or not in colour.
    """
    if not timm.is_model(name):
        names = [*timm.list_models(), *timm.list_pretrained()]
        listing = f"timm knows {len(names)}; timm.list_models('*vit*') lists those with vit in it."
        raise unknown("model of timm", name, names, listing)
    _check_grid(grid)
    if options.get("in_chans", 3) != 3:
        raise UserError(f"images have 3 channels; in_chans={options['in_chans']} cannot see them.")
    file = None if isinstance(pretrained, bool) else Path(pretrained)
    if file is not None and not file.is_file():
        raise UserError(f"there is no checkpoint {str(file)!r}; check the path.")
    if file is not None:
        options = {"num_classes": 0, **options}
    if pretrained is True:
        _check_hub(name)
    elif file is None:
        _warn_about_random_weights(name)
    try:
        vit: Any = timm.create_model(name, pretrained=pretrained is True, **options)
    except Exception as error:
        if pretrained is not True:
            raise UserError(f"timm cannot build {name!r} with {options}: {error}") from error
        raise _weights_error(name, "the Hugging Face Hub", str(error)) from error
    _check_is_vit(vit, name)
    if file is not None:
        _load_file(vit, name, file, not {"img_size", "patch_size"}.isdisjoint(options))
    with reading(f"timm/{name}"):
        model = TimmModel(vit.eval(), name, grid).to(device)
        model = model.to(torch.float32 if dtype == "auto" else dtype)
    if pretrained:
        refuse_faults(str(file or name), {"NaN or infinite": infinite(vit)})
    return TimmVision(model), SimpleNamespace(image_processor=_image_processor(model)), file


def _warn_about_random_weights(name: str) -> None:
    warnings.warn(
        f"timm/{name} has random weights, so what methods keep of an image says nothing about "
        "them; give trained weights (--pretrained FILE, pretrained=True).",
        UserWarning,
        stacklevel=4,  # tokenprune.load, whose caller is named
    )


def _check_hub(name: str) -> None:
    """Raise `UserError` if weights have to be downloaded and the Hub cannot be reached."""
    config: Any = timm.get_pretrained_cfg(name)
    place = getattr(config, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    if not place or any(isinstance(try_to_load_from_cache(place, one), str) for one in files):
        return
    reason = unreachable_hub()
    if reason:
        raise _weights_error(name, "the Hugging Face Hub", reason)


def _image_processor(model: TimmModel) -> LlavaNextImageProcessor:
    """A processor that cuts images into views as the model expects them."""
    settings = resolve_model_data_config(model.vit)  # type: ignore[no-untyped-call]
    side = model.vit.patch_embed.img_size[0]
    return LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
        resample={"bilinear": 2, "bicubic": 3}.get(settings["interpolation"], 3),
    )


def _load_file(vit: Any, name: str, file: Path, resized: bool) -> None:
    """Load a checkpoint of timm or of the model's authors.  Raises `UserError`.

    Args:
        vit: The model that it is for.
        name: Name of the model in timm.
        file: The checkpoint.
        resized: Whether the sizes of images or patches differ from the model's usual ones.
    """
    translate = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    classifier = vit.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = tuple(f"{head}." for head in heads if vit.num_classes == 0)

    own = {key: value.shape for key, value in vit.state_dict().items()}
    faults: dict[str, list[str]] = {}

    def fitting(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        faults["of integers"] = integers(state, model)
        if not resized:  # otherwise position embeddings and patches are resampled
            faults["of another shape than the model's"] = [
                f"{key}: {tuple(value.shape)} for {tuple(own[key])}"
                for key, value in state.items()
                if key in own and value.shape != own[key] and not key.startswith(dropped)
            ]
        if any(faults.values()):  # loading fails on them with a less helpful message
            return {}
        state = translate(state, model) if translate else state
        return {key: value for key, value in state.items() if not key.startswith(dropped)}

    try:
        found = load_checkpoint(vit, str(file), strict=False, filter_fn=fitting, weights_only=True)
    except Exception as error:
        raise _weights_error(name, str(file), str(error) or type(error).__name__) from error
    if found is not None and not any(
        faults.values()
    ):  # None for .npz files, which timm loads and checks
        faults = {"missing": found.missing_keys, "not of this model": found.unexpected_keys}
    refuse_faults(str(file), faults)


def _weights_error(name: str, source: str, said: str) -> UserError:
    reason = first_line(" ".join(said.split()))
    return UserError(
        f"cannot load weights for {name!r} from {source}: {reason}. Give "
        "pretrained=<path of a checkpoint>, or pretrained=False for random weights."
    )


def _check_grid(grid: Sequence[tuple[int, int]]) -> None:
    try:
        cells = [(int(rows), int(cols)) for rows, cols in grid]
    except (TypeError, ValueError):
        cells = []
    if not cells or min(min(cell) for cell in cells) < 1:
        raise UserError(
            f"grid={grid!r} must list the (rows, columns) of crops that an image may be cut into, "
            "e.g. [(1, 2), (2, 1), (2, 2)]."
        )


def _check_is_vit(vit: Any, name: str) -> None:
    blocks, embed = getattr(vit, "blocks", None), getattr(vit, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    chain = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
    plain = len(chain) > 0 and all(hasattr(block, "attn") for block in chain)
    plain &= hasattr(embed, "grid_size") and hasattr(vit, "num_prefix_tokens")
    plain &= not hasattr(vit, "blocks_token_only")  # the CLS token of CaiT joins after these blocks
    if not plain or size is None:
        raise UserError(
            f"{name!r} is not a plain vision transformer (one sequence of blocks with attention "
            "over all patches); take a ViT such as vit_base_patch16_clip_224."
        )
    if size[0] != size[1]:
        raise UserError(
            f"{name!r} takes views of {size[0]}x{size[1]} pixels; only square ones can tile an "
            "image here. Give img_size=<side>."
        )
