"""What a MODEL argument means: a small random `transformers` model by name, or a function of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from effopt.commands.own_function import made_by, told
from effopt.errors import EffoptError, OptionError, unknown

MODEL_HELP = (
    "An architecture of transformers (llama, qwen3, gpt2, bert, ...) with random weights,"
    " or package.module:function or file.py:function that returns (model, args, kwargs)."
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
Layers = Annotated[int, typer.Option(min=1, help="Layers of a named architecture.")]
Hidden = Annotated[int, typer.Option(min=8, help="Its hidden size.")]
Heads = Annotated[int, typer.Option(min=1, help="Its attention heads.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of its input.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens in a row.")]
Attention = Annotated[str, typer.Option(help="Its attention: eager or sdpa.")]
Train = Annotated[bool, typer.Option("--train", help="Forward and backward, instead of inference.")]
Passes = Annotated[str, typer.Option(help="Passes to add, in quotes: 'quantize-weights{bits=4,group=128}'.")]
Disable = Annotated[str, typer.Option(help="Passes to leave out, separated by commas.")]
Html = Annotated[str, typer.Option(help="Write the report as one HTML page.", show_default=False)]
JsonFile = Annotated[str, typer.Option("--json", help="Write the result as JSON.", show_default=False)]
Lowering = Annotated[
    str,
    typer.Option(help="auto; measured; reference, to inline every op; eager, to do without Inductor (fast)."),
]

NAMES = (
    "llama",
    "qwen3",
    "gemma2",
    "gpt2",
    "bert",
    "t5",
    "opt",
    "bloom",
    "falcon",
    "mixtral",
    "gpt_neox",
    "phi3",
)
"""Tested; any other text architecture that transformers can build from these sizes works as well."""

_ENCODERS = {"t5": "T5EncoderModel"}
_VOCABULARY = 1000


@dataclass(frozen=True)
class Size:
    """Of a named architecture."""

    layers: int = 4
    hidden: int = 512
    heads: int = 8
    batch: int = 1
    tokens: int = 128
    attention: str = "eager"


@dataclass(frozen=True)
class Example:
    """A model and one call of it."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load(name: str, size: Size) -> Example:
    """The model that a MODEL argument names, in evaluation mode if it is one of ours.

    Raises:
        OptionError: unknown name, a function that is not there or returns something else, a bad size.
        EffoptError: transformers is needed and not installed.
    """
    return _from_function(name) if ":" in name else _from_transformers(name.replace("-", "_"), size)


def _from_function(name: str) -> Example:
    made = made_by(name)
    if not (
        isinstance(made, tuple) and len(made) == 3 and callable(made[0]) and isinstance(made[2], Mapping)
    ):
        raise OptionError(f"{name} must return (model, args, kwargs), got {told(made)}")
    return Example(made[0], tuple(made[1]), dict(made[2]))


def _from_transformers(name: str, size: Size) -> Example:
    try:
        import transformers
    except ImportError as error:
        raise EffoptError(f"MODEL {name!r} needs transformers: pip install 'effopt[hf]'") from error
    import torch
    from transformers import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        raise OptionError(f"{unknown('MODEL', name, NAMES)}, or package.module:function or file.py:function")
    if size.attention not in ("eager", "sdpa"):
        raise unknown("attention", size.attention, ("eager", "sdpa"))
    if size.hidden % (2 * size.heads):
        raise OptionError(f"--hidden must be a multiple of twice --heads, got {size.hidden} and {size.heads}")
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(name, **_sizes(name, size))
        config._attn_implementation = size.attention
        config.use_cache = False
        model = _build(name, config)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0].split(". ")[0]
        raise OptionError(
            f"transformers cannot build {name!r} from these options ({type(error).__name__}: {first_line});"
            " write a function and name it as package.module:function"
        ) from error
    tokens = torch.randint(3, _VOCABULARY, (size.batch, size.tokens))
    return Example(model.eval(), (), {"input_ids": tokens})


def _build(name: str, config: Any) -> Any:
    import transformers

    if name in _ENCODERS:
        return getattr(transformers, _ENCODERS[name])(config)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    encoder = getattr(config, "is_decoder", None) is False and name in ("bert", "roberta", "electra")
    kind = transformers.AutoModelForCausalLM if causal and not encoder else transformers.AutoModel
    return kind.from_config(config)


def _sizes(name: str, size: Size) -> dict[str, Any]:
    """Configuration entries for `size`, of those that this architecture has; dropout off."""
    import transformers

    usual = transformers.AutoConfig.for_model(name)
    wide = size.hidden * 11 // 4 // 16 * 16
    wanted: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": max(1, size.heads // 2),
        "head_dim": size.hidden // size.heads,
        "intermediate_size": wide,
        "max_position_embeddings": max(size.tokens, 64),
        "n_positions": max(size.tokens, 64),
        "ffn_dim": wide,
        "d_kv": size.hidden // size.heads,
        "d_ff": wide,
        "word_embed_proj_dim": size.hidden,
        "num_local_experts": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    derived = {key for key in wanted if isinstance(getattr(type(usual), key, None), property)}
    wanted = {key: value for key, value in wanted.items() if hasattr(usual, key) and key not in derived}
    return wanted | {key: 0.0 for key, value in usual.to_dict().items() if _is_dropout(key, value)}


def _is_dropout(key: str, value: Any) -> bool:
    return isinstance(value, float) and any(word in key for word in ("drop", "pdrop"))
