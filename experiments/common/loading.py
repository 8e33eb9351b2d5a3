"""How an experiment loads its model: device, kernel, quantisation and revision."""

import os
from importlib.util import find_spec
from typing import Any, get_args

import torch

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.request import Kernel, ModelRequest, Quantization
from tokenprune.models import testbed
from tokenprune.models.checkpoints import dtype_of

__all__ = [
    "check_loading",
    "load_arguments",
    "options_of_answers",
]


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


KERNELS: tuple[Kernel, ...] = get_args(Kernel)


QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


# Methods read weights of the vision encoder, and the decoder has nearly all weights.
_NOT_QUANTIZED = [".*vision_tower", ".*multi_modal_projector", ".*visual", "lm_head"]


def check_loading(request: ModelRequest) -> None:
    """Check the options of a model before anything is read.

    Raises:
        UserError: A name is unknown, ``device`` and ``device_map`` are both given, a revision is
            given for a model that is not on the Hub, bitsandbytes is missing, or a timm model is
            given options of language models.
    """
    for what, value, known in (
        ("device map", request.device_map, DEVICE_MAPS),
        ("attention kernel", request.attn, KERNELS),
        ("quantization", request.quantize, QUANTIZATIONS),
    ):
        if value is not None and value not in known:
            raise unknown(what, value, known)
    if request.device is not None and request.device_map is not None:
        raise UserError("give either --device or --device-map, not both.")
    given = options_of_answers(request) | {"revision": request.revision}
    named = [name for name, value in given.items() if value is not None]
    if request.model.startswith("timm/") and named:
        raise UserError(
            f"{request.model} has no language model, so --{named[0].replace('_', '-')} does not "
            "apply to it; leave the option out."
        )
    local = request.model in testbed.names() or os.path.isdir(request.model)
    if request.revision is not None and local:
        raise UserError(
            f"--revision is for models of the Hub, and {request.model} is on this machine; leave "
            "it out, or give the Hub id."
        )
    if request.quantize is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {request.quantize} needs bitsandbytes, which is not installed; run "
            "pip install -e '.[quantize]', or leave the option out."
        )


def load_arguments(request: ModelRequest) -> dict[str, Any]:
    """The arguments of `tokenprune.load` for ``request``, apart from the name.

    Raises:
        UserError: As `check_loading`, or the dtype is unknown.
    """
    check_loading(request)
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "dtype": request.dtype,
        "trust_remote_code": request.trust_remote_code,
    }
    if request.device_map is not None:
        found["device_map"] = request.device_map
    elif request.quantize is not None:  # quantised weights cannot be moved to another device
        found["device_map"] = {"": device}
    else:
        found["device"] = device
    if request.attn is not None:
        found["attn_implementation"] = request.attn
    if request.revision is not None:
        found["revision"] = request.revision
    if request.quantize is not None:
        found |= _quantized(request)
    return found


def _quantized(request: ModelRequest) -> dict[str, Any]:
    """The dtype of what is not quantised, and the quantisation of the rest.

    The decoder's linear layers are quantised: NF4 (QLoRA, arXiv 2305.14314) or LLM.int8 (arXiv
    2208.07339), which multiplies in float16.
    """
    from transformers import BitsAndBytesConfig

    four = request.quantize == "4bit"
    usual = "bfloat16" if four else "float16"
    dtype = dtype_of(usual if request.dtype == "auto" else request.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )
    return {"dtype": dtype, "quantization_config": config}


def options_of_answers(request: ModelRequest) -> dict[str, str]:
    """The given options that can change an answer, for the manifest.

    The dtype, the kind of device and the commit of a Hub model are recorded as they turn out.
    """
    names = ("device_map", "attn", "quantize", "system")
    given = {name: getattr(request, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
