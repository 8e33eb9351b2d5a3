"""What the processor of a model family writes, and what goes into the model besides the ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.parts import ModelParts

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.tokens import VisualTokens

__all__ = ["ModelInputs"]


class ModelInputs(ModelParts):
    """The inputs of a model family.  Its attributes are described in `Adapter`."""

    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    video_arguments: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    image_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    notes: ClassVar[tuple[str, ...]] = ()
    reads_prompt: ClassVar[bool] = False
    stacks_videos: ClassVar[bool] = True

    def bind(self, processor: Any) -> None:
        """Note the settings of the model's processor on which `layout` depends."""

    def encoding_arguments(self, layouts: Sequence[TokenLayout]) -> dict[str, Tensor]:
        """Arguments that go with encoded images and videos in place of their pixels."""
        return {}

    def encoder_call(self, modality: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the encoder, and `notes`, from the output of a processor.

        Args:
            modality: ``image`` or ``video``.
            batch: Output of the image processor or of the video processor.
        """
        names = self.image_arguments if modality == "image" else self.video_arguments
        return {name: batch[name] for name in names}

    def runs(self, layout: TokenLayout) -> list[int]:
        """Lengths of the runs of placeholders of an image or video, between which there is text."""
        return [len(layout)]

    def video_options(self, processor: Any, frames: Sequence[int]) -> dict[str, Any]:
        """Options with which the processor takes videos of so many ``frames`` as they are."""
        return {}

    def prompt_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        """Arguments of the model that follow from the input ids (B, S) alone."""
        return {}

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise `UserError` if the arguments of a forward do not belong together.

        Args:
            inputs: The arguments, those by position as well.
        """

    def annotate(self, inputs: Mapping[str, Any], frames: Sequence[int]) -> None:
        """Attach to the inputs of a model what `layouts` cannot find in them otherwise.

        Args:
            inputs: Inputs of ``model.generate`` and ``model.forward``, as the processor made them.
            frames: For every image and video, in the order of the prompts, its number of frames; 0
                for an image.
        """

    def spelled(self, tokens: VisualTokens, length: int, processor: Any) -> str:
        """The text that stands for an encoded image or video in a prompt.

        Args:
            tokens: The image or video.
            length: Number of placeholders: that of its tokens, or 0 to leave them out.
            processor: Processor of the model.
        """
        return str(getattr(processor, f"{tokens.layout.modality}_token")) * length

    def grouped(self, images: list[list[Image]]) -> Any:
        """The images of all prompts, nested as the processor expects them."""
        return [image for some in images for image in some]
