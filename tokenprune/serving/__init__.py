"""Compress images for a server that knows nothing of tokenprune, such as vLLM.

The server receives features (M, D) of the visual tokens that stay, or whole prompts as embeddings.
Nothing here imports a server.
"""

from tokenprune.serving.clients import check_embeds
from tokenprune.serving.counting import check_counted
from tokenprune.serving.embeds import image_embeds, prompt_embeds
from tokenprune.serving.keys import fingerprint, uuid
from tokenprune.serving.specs import check_served, served

__all__ = [
    "check_counted",
    "check_embeds",
    "check_served",
    "fingerprint",
    "image_embeds",
    "prompt_embeds",
    "served",
    "uuid",
]
