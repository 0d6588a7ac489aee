"""Masked autoencoders written after facebookresearch/mae, and Hugging Face's ViTMAE, with sslfast's kernels in them.

That code is no package: its class is copied into other repositories, and changed there. So every class named
``MaskedAutoencoderViT`` among the loaded modules is tried out: a small model of it is built, and each of its methods
that gives the numbers and gradients of sslfast's form is served; the others stay as they are.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._mae import (
    hooked,
    masked_tokens,
    masks,
    patch_loss,
    restored_tokens,
    unserved_places,
    unserved_positions,
    unserved_projection,
    visible_tokens,
)
from ._serve import Package, Unserved, adapter_class, overridden, served
from ._trial import random_numbers_kept, same, seed, shaken

NAME = "MaskedAutoencoderViT"
SIGNATURES: dict[str, tuple[str, ...]] = {
    "random_masking": ("self", "x", "mask_ratio"),
    "forward_encoder": ("self", "x", "mask_ratio"),
    "forward_decoder": ("self", "x", "ids_restore"),
    "forward_loss": ("self", "imgs", "pred", "mask"),
}
REQUIRED = ("random_masking", "forward_loss")
SMALL = {
    "img_size": 24,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
# What the constructor of facebookresearch/mae takes besides: others may change what a method does.
NEUTRAL = ("self", "mlp_ratio", "norm_layer", "norm_pix_loss")
HUGGING_FACE = "transformers.models.vit_mae.modeling_vit_mae"

Fast = Callable[..., Any]


# ----------------------------------------------------------------------------------------- facebookresearch/mae's class


def _random_masking(self: Any, x: Tensor, mask_ratio: float) -> Any:
    return masked_tokens(x, mask_ratio)


def _forward_encoder(owner: type, embedding: type, self: Any, x: Tensor, mask_ratio: float) -> Any:
    embed = self.patch_embed
    unserved = overridden(self, owner, "random_masking")
    if unserved:
        return unserved
    if not _only_projects(embed, embedding):
        return Unserved(f"patch_embed is a {type(embed).__name__} with more than a projection, or with hooks")
    unserved = unserved_projection(embed.proj, x)
    if unserved:
        return unserved
    if tuple(getattr(embed, "img_size", None) or x.shape[2:]) != tuple(x.shape[2:]):
        return Unserved(f"images of {tuple(x.shape[2:])} pixels for a model of {embed.img_size}")
    unserved = unserved_positions(x, embed.proj, self.pos_embed, self.cls_token)
    if unserved:
        return unserved
    chosen = masks((x.shape[0], self.pos_embed.shape[1] - 1), mask_ratio, x.device)
    if isinstance(chosen, Unserved):
        return chosen
    ids_keep, mask, restore = chosen
    tokens = visible_tokens(x, embed.proj, ids_keep, self.pos_embed, self.cls_token)
    for block in self.blocks:
        tokens = block(tokens)
    return self.norm(tokens), mask, restore


def _only_projects(embed: Any, kind: type) -> bool:
    """``embed`` is what was tried out, and of timm's options has none: no norm, no padding, tokens as rows."""
    if type(embed) is not kind or hooked(embed):
        return False
    norm = getattr(embed, "norm", None)
    neutral = norm is None or (type(norm) is nn.Identity and not hooked(norm))
    return neutral and getattr(embed, "flatten", True) is True and not getattr(embed, "dynamic_img_pad", False)


def _forward_decoder(self: Any, x: Tensor, ids_restore: Tensor) -> Any:
    unserved = unserved_places(x, ids_restore, self.mask_token, self.decoder_pos_embed)
    if unserved:
        return unserved
    tokens = restored_tokens(self.decoder_embed(x), ids_restore, self.mask_token, self.decoder_pos_embed)
    if isinstance(tokens, Unserved):
        return tokens
    for block in self.decoder_blocks:
        tokens = block(tokens)
    return self.decoder_pred(self.decoder_norm(tokens))[:, 1:, :]


def _forward_loss(owner: type, self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Any:
    unserved = overridden(self, owner, "patchify")
    if unserved:
        return unserved
    return patch_loss(imgs, pred, mask, self.patch_embed.patch_size[0], bool(self.norm_pix_loss))


# --------------------------------------------------------------------------------------------------------- Hugging Face


def _hf_random_masking(self: Any, sequence: Tensor, noise: Tensor | None = None) -> Any:
    return masked_tokens(sequence, self.config.mask_ratio, noise)


def _hf_embeddings(
    owner: type, self: Any, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
) -> Any:
    embed = self.patch_embeddings
    unserved = overridden(self, owner, "random_masking")
    if unserved:
        return unserved
    if interpolate_pos_encoding:
        return Unserved("interpolated positions")
    if type(embed).__module__ != HUGGING_FACE or hooked(embed):
        return Unserved(f"patch_embeddings is a {type(embed).__name__}, or has hooks")
    projection = embed.projection
    unserved = unserved_projection(projection, pixel_values)
    if unserved:
        return unserved
    if tuple(pixel_values.shape[2:]) != tuple(self.image_size):
        return Unserved(f"images of {tuple(pixel_values.shape[2:])} pixels for a model of {tuple(self.image_size)}")
    unserved = unserved_positions(pixel_values, projection, self.position_embeddings, self.cls_token)
    if unserved:
        return unserved
    tokens = (pixel_values.shape[0], self.position_embeddings.shape[1] - 1)
    chosen = masks(tokens, self.config.mask_ratio, pixel_values.device, noise)
    if isinstance(chosen, Unserved):
        return chosen
    ids_keep, mask, restore = chosen
    return visible_tokens(pixel_values, projection, ids_keep, self.position_embeddings, self.cls_token), mask, restore


def _hf_decoder(self: Any, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False) -> Any:
    if interpolate_pos_encoding:
        return Unserved("interpolated positions")
    unserved = unserved_places(hidden_states, ids_restore, self.mask_token, self.decoder_pos_embed)
    if unserved:
        return unserved
    x = restored_tokens(self.decoder_embed(hidden_states), ids_restore, self.mask_token, self.decoder_pos_embed)
    if isinstance(x, Unserved):
        return x
    for layer in self.decoder_layers:
        x = layer(x)
    logits = self.decoder_pred(self.decoder_norm(x))[:, 1:, :]
    return sys.modules[HUGGING_FACE].ViTMAEDecoderOutput(logits=logits)


# ---------------------------------------------------------------------------------------------- what is found and tried


def _classes() -> list[type]:
    """Every class of the name with the two methods that make it a masked autoencoder of that kind, each once."""
    found: dict[int, type] = {}
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            # Not isinstance(value, type): of an object that stands for another one it asks that one, which may warn.
            own = issubclass(type(value), type) and value.__name__ == NAME and issubclass(value, nn.Module)
            if own and all(_has(value, method) for method in REQUIRED):
                found[id(value)] = value
    return sorted(found.values(), key=lambda cls: cls.__module__)


def _has(cls: type, method: str) -> bool:
    """``cls`` itself, not a base, defines the method, with the arguments of facebookresearch/mae's."""
    function = vars(cls).get(method)
    return inspect.isfunction(function) and tuple(inspect.signature(function).parameters) == SIGNATURES[method]


def _small(cls: Any) -> Any:
    """A small model of the class, or why there is none."""
    parameters = inspect.signature(cls.__init__).parameters
    unknown = [name for name in parameters if name not in SMALL and name not in NEUTRAL]
    if unknown:
        return Unserved(f"its constructor takes {', '.join(unknown)}, and sslfast cannot know what for")
    try:
        return shaken(cls(**{name: value for name, value in SMALL.items() if name in parameters}))
    except Exception as error:
        return Unserved(f"a small model of it could not be built: {type(error).__name__}: {error}")


def _trials(model: Any) -> dict[str, list[tuple[Any, ...]]]:
    """What each method is tried with: [method: [arguments]]."""
    images = torch.rand(3, 3, 24, 24, dtype=torch.float64)
    tokens = [torch.randn(3, length, 32, dtype=torch.float64, requires_grad=True) for length in (9, 20)]
    latent = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    restore = torch.rand(3, 9).argsort(1)
    pred = torch.randn(3, 9, 192, dtype=torch.float64, requires_grad=True)
    # A class may round the number of kept tokens in another way: of 9 tokens these ratios keep fractions on both sides
    # of one half, and of 20 numbers that are whole, but for float arithmetic: 20 · (1 − 0.8) < 4.
    ratios = [step / 20 for step in range(18)]
    several = restore > torch.tensor([[1], [4], [6]])  # not as many in each image: a mean per image is another loss
    return {
        "random_masking": [(t, ratio) for t in tokens for ratio in ratios],
        "forward_encoder": [(images, ratio) for ratio in (0.75, 0.7, 0.5, 0.2)],
        "forward_decoder": [(latent, restore)],
        "forward_loss": [(images, pred, several.float())],
    }


def _served_methods(cls: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The methods that sslfast serves, and those that it leaves, with the reason."""
    model = _small(cls)
    if isinstance(model, Unserved):
        return {}, {method: model.reason for method in SIGNATURES if hasattr(cls, method)}
    fast: dict[str, Fast] = {
        "random_masking": _random_masking,
        "forward_encoder": functools.partial(_forward_encoder, cls, type(getattr(model, "patch_embed", None))),
        "forward_decoder": _forward_decoder,
        "forward_loss": functools.partial(_forward_loss, cls),
    }
    methods: dict[str, Any] = {}
    unchanged: dict[str, str] = {}
    for name, calls in _trials(model).items():
        original = vars(cls).get(name)
        if original is None:
            continue
        if not _has(cls, name):
            unchanged[name] = "its arguments are not those of facebookresearch/mae's"
            continue
        if name == "forward_encoder" and "random_masking" in unchanged:  # sslfast's encoder draws its masks without it
            unchanged[name] = "it does not compute what facebookresearch/mae's does, whose random_masking is another"
            continue
        alike = True
        for normalise in (False, True) if name == "forward_loss" else (False,):
            model.norm_pix_loss = normalise
            alike = alike and same(original, fast[name], model, calls)
        if alike:
            methods[name] = served(original, fast[name])
        else:
            unchanged[name] = "it does not compute what facebookresearch/mae's does"
    return methods, unchanged


def _hugging_face() -> tuple[tuple[type, ...], dict[str, str]]:
    """Adapter classes of ViTMAE's embeddings and decoder, if it is loaded."""
    module: Any = sys.modules.get(HUGGING_FACE)
    if module is None:
        return (), {}
    config = module.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=24,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        mask_ratio=0.7,  # of 9 tokens 2.7 stay: rounded in another way, it shows
        attn_implementation="eager",
    )
    embeddings, decoder = module.ViTMAEEmbeddings, module.ViTMAEDecoder
    small = shaken(embeddings(config)), shaken(decoder(config, num_patches=9))
    trials = _trials(None)
    noise, images = torch.rand(3, 9), trials["forward_encoder"][0][0]
    wanted: list[tuple[Any, str, Fast, Any, list[tuple[Any, ...]]]] = [
        (embeddings, "random_masking", _hf_random_masking, small[0], [(trials["random_masking"][0][0], noise)]),
        (
            embeddings,
            "forward",
            functools.partial(_hf_embeddings, embeddings),
            small[0],
            [(images,), (images, noise)],
        ),
        (decoder, "forward", _hf_decoder, small[1], trials["forward_decoder"]),
    ]
    adapters: dict[type, dict[str, Any]] = {}
    unchanged = {"ViTMAEForPreTraining": "its loss is a part of forward, which has the whole model in it"}
    for cls, name, fast, model, calls in wanted:
        original = vars(cls)[name]
        arguments = (tuple(inspect.signature(function).parameters) for function in (original, fast))
        # The embeddings' fast form draws its masks without the class's random_masking, which is tried first.
        other_masks = cls is embeddings and f"{cls.__name__}.random_masking" in unchanged
        if not other_masks and len(set(arguments)) == 1 and same(original, fast, model, calls):
            adapters.setdefault(cls, {})[name] = served(original, fast)
        else:
            unchanged[f"{cls.__name__}.{name}"] = "this version of transformers computes something else"
    return tuple(adapter_class(cls, methods, __name__) for cls, methods in adapters.items()), unchanged


def contents() -> Package:
    """Everything that the loaded modules hold; see the module's docstring.

    Raises:
        ImportError: there is neither such a class nor ViTMAE among the loaded modules, and no ``models_mae`` to import.
    """
    missing: ImportError | None = None
    try:
        importlib.import_module("models_mae")
    except ImportError as error:
        missing = error
    classes: list[type] = []
    unchanged: dict[str, str] = {}
    with random_numbers_kept():
        seed()
        for cls in _classes():
            methods, not_served = _served_methods(cls)
            unchanged |= {f"{cls.__module__}.{NAME}.{method}": reason for method, reason in not_served.items()}
            if methods:
                classes.append(adapter_class(cls, methods, __name__))
        adapters, not_served = _hugging_face()
    classes += adapters
    unchanged |= not_served
    if not classes and not unchanged:
        raise ImportError(
            f"no loaded module has a class {NAME} with random_masking(self, x, mask_ratio) and "
            "forward_loss(self, imgs, pred, mask): import the module that defines it (or transformers' ViTMAE) before "
            f"sslfast.patch('mae'); {missing}"
        )
    return Package(tuple(classes), unchanged=unchanged)
