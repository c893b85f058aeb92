"""Language models in and out of folders: made small from a shape, loaded, saved with their prompt.

A recommender's folder is a Hugging Face folder (`model.safetensors`, `config.json`, the tokenizer's files)
and `recray_items.json`, the labels of the items in item order, and `recray_prompt.json`, which says how
prompts are written. Only safetensors are read: a pickle can run code.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template
from recray.errors import CatalogueError, ConfigError, ModelError
from recray.lm.attention import use_flex
from recray.lm.lora import nf4_settings
from recray.lm.prefix_attention import use_prefix

Model: TypeAlias = PreTrainedModel  # for those who may not import transformers
Tokenizer: TypeAlias = PreTrainedTokenizerBase

PROMPT_FILE = "recray_prompt.json"
ITEMS_FILE = "recray_items.json"

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def make_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    max_positions: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return a Llama of this shape with random weights, the same for the same seed.

    Input and output embeddings are one matrix with a row a token of `tokenizer`. The caller's random state is
    left as it was.

    Raises:
        ModelError: if the heads do not divide `hidden_size` into even parts.
    """
    if hidden_size % (2 * heads):
        raise ModelError(
            f"hidden_size {hidden_size} can't be cut into {heads} heads of an even size; use a multiple of {2 * heads}"
        )
    config = LlamaConfig(
        vocab_size=_rows_needed(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return _attending(model, None)


def load_model(
    folder_or_id: str | Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a local Hugging Face folder or a hub id.

    A tokenizer without a padding token pads with its end token; no row is added to the model for it.

    Args:
        folder_or_id: A `Path`, or text that names an existing folder or looks like a path, is a folder; other
            text is a hub id.
        dtype: Of the weights in memory.
        trust_remote_code: Whether code that comes with the model may run.
        attention: transformers' `attn_implementation`. None: what serves packed prompts best here, where the model
            allows it (`recray.lm.attention`, `recray.lm.prefix_attention`), else transformers' own choice.
        quantization: "nf4" for linear layers in 4 bits, frozen, which needs bitsandbytes and a GPU; or "none".

    Raises:
        ModelError: saying what to do, if anything is missing or broken, or if model and tokenizer do not fit.
    """
    source = _source(folder_or_id)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization == "nf4":
        settings["quantization_config"] = nf4_settings(dtype)
    model = _load_weights(source, attention=attention, **settings)
    rows = model.get_input_embeddings().num_embeddings
    if _rows_needed(tokenizer) > rows:
        raise ModelError(
            f"{source}: the tokenizer has {_rows_needed(tokenizer)} tokens, but the model has embeddings for "
            f"{rows}; use the tokenizer that came with the model, or resize the embeddings and save it again"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
) -> None:
    """Write weights (safetensors), tokenizer, items and prompt to `folder`, the prompt last.

    Args:
        folder: Made if need be.
        model: Weights and configuration.
        tokenizer: The one that `catalogue` was made with.
        catalogue: The items and their prompts, as in training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, value in ((ITEMS_FILE, list(catalogue.labels)), (PROMPT_FILE, catalogue.facts())):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def load_prompt(folder: Path) -> dict[str, Any]:
    """Return what `Catalogue.facts` said of the model's prompts when it was saved.

    Raises:
        ModelError: if the folder has no such file, or it is not what recray wrote.
    """
    prompt: dict[str, Any] = _read_json(folder / PROMPT_FILE, dict)
    missing = {"template", "version", "max_tokens", "fingerprint", "shares_prompt"} - set(prompt)
    if missing:
        raise ModelError(f"{folder / PROMPT_FILE} lacks {', '.join(sorted(missing))}; make the folder again")
    return prompt


def open_recommender(
    folder: Path,
    labels: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, Catalogue]:
    """Return a model that recray trained, and the catalogue as it was tokenised for it.

    Args:
        folder: Written by `save_model`.
        labels: The items' labels in item order, to be held against those of training. None: the latter.
        dtype: Of the weights in memory.
        attention: transformers' `attn_implementation`. None: what serves packed prompts best here, where the model
            allows it (`recray.lm.attention`, `recray.lm.prefix_attention`), else transformers' own choice.
        quantization: As in `load_model`.

    Raises:
        ModelError: if the folder can't be loaded.
        CatalogueError: with both fingerprints, if these labels, the tokenizer or this version's prompts are
            not those the model was trained with.
    """
    catalogue = open_catalogue(folder, labels)
    model, _ = load_model(folder, dtype=dtype, attention=attention, quantization=quantization)
    return model, catalogue


def open_catalogue(folder: Path, labels: Sequence[str] | None = None) -> Catalogue:
    """Return the catalogue of a model that recray trained, without its weights; raises as `open_recommender`."""
    prompt = load_prompt(folder)
    items = _read_json(folder / ITEMS_FILE, list) if labels is None else labels
    tokenizer = load_tokenizer(folder)
    try:
        template = find_template(prompt["template"])
    except ConfigError as error:
        raise CatalogueError(f"{folder} was trained with a template that this recray lacks: {error}") from None
    catalogue = Catalogue.build(items, tokenizer, template, prompt["max_tokens"])
    if catalogue.fingerprint != prompt["fingerprint"]:
        raise CatalogueError(
            f"{folder} was trained with catalogue {prompt['fingerprint']} (template {prompt['template']} "
            f"version {prompt['version']}), but these {len(items)} items with template version "
            f"{template.version} are {catalogue.fingerprint}; use the items of its training, or train again"
        )
    catalogue.shares_prompt = prompt["shares_prompt"]
    return catalogue


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format in which a model folder's weights were saved; float32 where it does not say."""
    name = _read_json(folder / "config.json", dict).get("dtype", "float32")
    found: torch.dtype = getattr(torch, name)
    return found


def load_tokenizer(folder_or_id: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local Hugging Face folder or a hub id, as `load_model` does.

    Raises:
        ModelError: if it is missing or broken, or has no end token.
    """
    source = _source(folder_or_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers and tokenizers raise whatever a broken file leads to, the bare Exception too.
        raise ModelError(
            f"{_known(source)}: the tokenizer can't be loaded ({_first_line(error)}); expected tokenizer.json "
            f"and tokenizer_config.json as saved by transformers"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has no end-of-sequence token, so no item can end; set its eos_token and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path}, so it is no recommender that recray trained; run `recray sft`") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); the folder is damaged, make it again") from None
    if not isinstance(value, kind):
        raise ModelError(f"{path}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def _source(folder_or_id: str | Path) -> str:
    """Return the local folder, checked, or the hub id."""
    text = os.path.expanduser(folder_or_id)
    looks_local = isinstance(folder_or_id, Path) or text.startswith((".", "/")) or text.count("/") > 1
    folder = Path(text)
    if not looks_local and not folder.exists():
        return text
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}; name a folder with config.json, or a hub id like OWNER/NAME")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    _read_json(folder / "config.json", dict)
    return str(folder)


def _known(source: str) -> str:
    """Return how a message names the source: of a hub id it says that no folder has this name."""
    return source if Path(source).exists() else f"{source} (no folder here, so taken for a hub id)"


def _load_weights(source: str, *, attention: str | None, **settings: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            **settings,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{_known(source)}: the model can't be loaded ({_first_line(error)}); expected a causal "
            f"language model as saved by transformers, weights as safetensors"
        ) from error
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            f"{source}: {name} has shape {list(found)} in the weights, but {list(expected)} by config.json; "
            f"the two belong to different models, fetch or save the folder again"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{source}: {len(missing)} weights of the model are not there, {missing[0]} for one, and would "
            f"be random; use a folder with the weights of a whole causal language model"
        )
    return _attending(model, attention)


def _attending(model: PreTrainedModel, asked: str | None) -> PreTrainedModel:
    """Return the model with the attention that serves packed prompts best here, where nothing else is asked for."""
    if asked is None:
        (use_flex if torch.cuda.is_available() else use_prefix)(model)
    return model


def _rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the embedding rows that every token of `tokenizer` needs; ids may have holes."""
    ids: list[int] = list(tokenizer.get_vocab().values())
    return max(ids) + 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
