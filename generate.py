"""Text from a checkpoint: `python generate.py --checkpoint runs/tiny --prompt "def "`.

The checkpoint is a run folder of train.py or convert.py, or a Hugging Face folder. `generate.py
score --checkpoint DIR --tokens FILE.npy` writes logits or prints the loss of given tokens.
"""

from runtime.interpreter import check_interpreter

check_interpreter()  # in one line, before an import fails

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from configs.options import parse_options
from generation.config import ExpertOptions, Sampling, Speculation
from generation.defaults import folder_sampling, said_of_sampling
from generation.text import Answers, TextStream
from runtime.config import RuntimeOptions
from runtime.outputs import check_outputs
from sharding.config import LAYOUTS, MeshConfig
from vision.options import ImageOptions

if TYPE_CHECKING:
    import numpy as np

    from checkpoint.weights import Weights
    from data.tokenizer import Tokenizer
    from generation.prompts import Prompt
    from model.config import ModelConfig
    from model.recipe import Recipe
    from sharding.partition import Layout


DEFAULT_NEW_TOKENS = 256
PLACES = ("checkpoint", "out", "ids-out", "pixels-out", "save-expert-load")
"""Options that may differ between processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(RuntimeOptions):
    """What generation and scoring share."""

    checkpoint: Path
    """Run folder of train.py or convert.py, or Hugging Face folder."""
    layout: Literal[("", *LAYOUTS)] = ""  # pyright: ignore[reportInvalidTypeForm]
    """Layout by name; single axes: --mesh.AXIS."""
    mesh: MeshConfig = MeshConfig(data=-1)
    """Devices per mesh axis; weights are whole over fsdp while generating."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products."""
    kernels: Literal["auto", "mosaic", "emulated", "library", "portable", "reference"] = "auto"
    """Backend of the hot paths. auto: our kernels on Hopper, a library's on other GPUs where it is
    installed, XLA for the rest. mosaic: our kernels or an error. library: the library's where it
    has one. emulated: our kernels on CPU, for tests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Generate text. Several prompts are one batch. Text goes to stdout, figures to stderr.

    A single answer is written as it comes; several are written whole, in the prompts' order, each
    as soon as it and those before it are complete.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given again."""
    prompts: Path | None = None
    """File of prompts: one per line, or .jsonl of {"prompt": ..} or {"messages": [..]}."""
    prompt_ids: str = ""
    """A prompt as token ids, 1,2,3; the answer is ids too. Needs no tokenizer."""
    chat: bool = False
    """Put prompts into the folder's own chat template; without one, into that of V3 and R1."""
    system: str = ""
    """System prompt, with --chat."""
    think: bool = False
    """Ask for reasoning, with --chat: the template's `thinking`, or an answer that opens with
    <think>."""
    special: bool = False
    """Read names of special tokens in prompts as these tokens, for fill-in-the-middle or a template
    by hand; without it they are letters."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens. Without it 256, or the room that the longest prompt leaves."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string, or the name of a special token, that ends an answer and is not part of it; may be
    given again."""
    speculate: Literal["off", "on", "auto"] = "off"
    """Let the MTP module draft tokens; the distribution of the text stays the same. auto, or the
    option alone, times it first and stops where it does not pay; a seed's text may then differ
    between runs, unless temperature is 0."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    """How tokens are drawn; by default as generation_config.json of the folder says."""
    experts: Annotated[ExpertOptions, tyro.conf.arg(name="")] = ExpertOptions()
    """Redundant experts, and the load that decides which."""
    pictures: Annotated[ImageOptions, tyro.conf.arg(name="")] = ImageOptions()
    """Images that are read or drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Common):
    """Logits, or loss and perplexity, of given tokens."""

    tokens: Path
    """.npy file of int32 [B, T]."""
    pixels: Path | None = None
    """.npy file of float32 [images, 3, H, W], prepared images in the order of their places."""
    out: Path | None = None
    """Where float32 logits [B, T, V] go; without it loss and perplexity are printed."""
    mtp: bool = False
    """Also those of MTP module k (OUT.mtp.npy, OUT.mtp2.npy); NaN where no token is k ahead."""


# ---- Command line --------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Generate | Score:
    """Read the command line; exits with near matches on an unknown option."""
    scores = list(arguments[:1]) == ["score"]
    rest = list(arguments[1:] if scores else arguments)
    rest = [word for pair in itertools.zip_longest(rest, rest[1:]) for word in spelled_out(*pair)]
    # The layout decides the defaults of the mesh's axes, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--layout", default="")
    first.add_argument("--checkpoint", type=Path, default=Path())
    early = first.parse_known_args(rest)[0]
    mesh = LAYOUTS.get(early.layout, Common.mesh)
    if scores:
        default = Score(checkpoint=tyro.MISSING, tokens=tyro.MISSING, mesh=mesh)
        return parse_options(default, rest, "generate.py score")
    # And so does what the folder says about sampling text; codes of images are drawn as published.
    draws = any(word.startswith("--draw") for word in rest)
    sampling = Sampling() if draws else folder_sampling(early.checkpoint)
    default = Generate(checkpoint=tyro.MISSING, mesh=mesh, sampling=sampling)
    return parse_options(default, rest, "generate.py")


def spelled_out(word: str, following: str | None) -> list[str]:
    """A word of the command line, with its value if it is --speculate and stands alone."""
    alone = word == "--speculate" and (following is None or following.startswith("-"))
    return [word, "auto"] if alone else [word]


def note(line: str) -> None:
    """A line for people, beside the text."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done. 1: an error of the program. 2: a request that cannot be met. 3: another process was
    lost or failed.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(options, Generate):
            check_options(options)
    except ValueError as error:
        note(f"generate.py: {error}")
        return 2
    from runtime.processes import together  # --help needs no JAX

    return together("generate.py", lambda: run(options), (ValueError, OSError, FloatingPointError))


def run(options: Generate | Score) -> int:
    """Do what the command line asks for."""
    from checkpoint.weights import open_weights, weights_version
    from runtime.agreement import agree, agree_on_command
    from runtime.start import start
    from sharding.mesh import make_layout

    start(options)
    agree_on_command(options, ("sampling", "experts", "pictures"), PLACES)
    layout = make_layout(options.mesh)
    source = open_weights(options.checkpoint)
    agree("weights", lambda: {"version": weights_version(source)})
    if isinstance(options, Score):
        return score(options, source, layout)
    if options.pictures.draws:
        return draw(options, source, layout)
    return generate(options, source, layout)


def check_options(options: Generate) -> None:
    """Raise ValueError for options that would be without effect beside the others."""
    talks = options.chat or options.pictures.image
    if (options.system or options.think) and not talks:
        raise ValueError("--system and --think belong to a conversation; add --chat")
    texts = options.prompt or options.prompts or options.chat or options.stop or options.special
    if options.prompt_ids and texts:
        raise ValueError(
            "--prompt-ids is a single prompt of ids and its answer is ids; leave out --prompt, "
            "--prompts, --chat, --special and --stop"
        )
    asks = bool(options.prompt or options.prompts or options.prompt_ids)
    options.pictures.check(asks)
    outputs = {"--ids-out": options.pictures.ids_out, "--pixels-out": options.pictures.pixels_out}
    check_outputs(outputs | {"--save-expert-load": options.experts.save_expert_load})
    if options.pictures.draws:
        given = {
            "--chat": options.chat,
            "--special": options.special,
            "--stop": options.stop,
            "--max-new-tokens": options.max_new_tokens is not None,
            "--speculate": options.speculate != "off",
        }
        if idle := [name for name, value in given.items() if value]:
            raise ValueError(
                f"{', '.join(idle)}: --draw writes no text; leave out one or the other"
            )
        return
    if options.special and options.chat:
        raise ValueError("--special is for texts, not for a conversation; leave out --chat or it")
    if not asks:
        raise ValueError("nothing to do: give --prompt TEXT, --prompts FILE or --prompt-ids 1,2,3")


# ---- Prompts -------------------------------------------------------------------------------------


def load_tokenizer(source: "Weights") -> "Tokenizer | None":
    """The tokenizer beside the weights, if there is one."""
    from data.tokenizer import load_tokenizer

    files = [file for file in source.carried if file.name == "tokenizer.json"]
    return load_tokenizer(files[0]) if files else None


def encode_prompts(
    options: Generate, source: "Weights", tokenizer: "Tokenizer | None"
) -> "list[np.ndarray]":
    """Token ids of every prompt, int32 [n] each."""
    from generation.chat import encode_chat
    from generation.prompts import as_conversation, parse_ids, read_prompts

    if options.prompt_ids:
        return [parse_ids(options.prompt_ids)]
    if options.pictures.image and tokenizer is not None:
        return image_questions(options, source, tokenizer)
    if tokenizer is None:
        raise ValueError(f"{options.checkpoint} has no tokenizer.json; give --prompt-ids")
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    warn_of_prompts(options, tokenizer, prompts)
    return [
        tokenizer.encode_prompt(prompt, options.special)
        if isinstance(prompt, str) and not options.chat
        else encode_chat(tokenizer, as_conversation(prompt, options.system), options.think)
        for prompt in prompts
    ]


def image_questions(
    options: Generate, source: "Weights", tokenizer: "Tokenizer"
) -> "list[np.ndarray]":
    """Token ids of every prompt as a question about all images, in the published conversation."""
    from generation.prompts import read_prompts
    from vision.command import conversations

    if options.chat or options.special or options.think:
        raise ValueError("--image has a conversation of its own; leave out --chat and --special")
    talk = conversations(source, tokenizer)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("with --image, prompts are texts")
    count = len(options.pictures.image)
    return [talk.question(str(prompt), count, options.system or None) for prompt in prompts]


def warn_of_prompts(options: Generate, tokenizer: "Tokenizer", prompts: "list[Prompt]") -> None:
    """Say what of the prompts is not read as it may be meant."""
    from generation.chat import check_messages, opens_thought, reads_think
    from generation.prompts import as_conversation

    for prompt in prompts:
        if not isinstance(prompt, str):
            check_messages(prompt)
    asked = as_conversation(prompts[0], options.system)
    if options.think and not (reads_think(tokenizer, asked) or opens_thought(tokenizer, asked)):
        note("warning: --think changes nothing, since the folder's chat template has no `thinking`")
    found = {name for prompt in prompts for name in tokenizer.marks_in(str(prompt))}
    if found and not options.special:
        remedy = "" if options.chat else "; --special reads them as tokens"
        note(f"warning: {', '.join(sorted(found))} in prompts are read as letters{remedy}")


def end_ids(source: "Weights", tokenizer: "Tokenizer | None") -> tuple[int, ...]:
    """Tokens that end a text: of the tokenizer and the files beside it."""
    from data.conventions import end_ids

    if tokenizer is not None:
        return tokenizer.end_ids
    return end_ids({f.name: f.read_text("utf-8") for f in source.carried if f.suffix == ".json"})


def stops_of(options: Generate, tokenizer: "Tokenizer | None") -> tuple[list[str], list[int]]:
    """--stop as strings to look for in the text, and as ids of special tokens, which are no part of
    the text. ValueError for a string that holds one of these and more."""
    strings: list[str] = []
    ids: list[int] = []
    for stop in options.stop:
        hidden = [] if tokenizer is None else [x for x in tokenizer.specials if x in stop]
        if tokenizer is not None and stop in hidden:
            ids.append(tokenizer.token_id(stop))
        elif hidden:
            raise ValueError(
                f"--stop {stop!r} holds the special token {hidden[0]}, which is no part of the "
                f"text; give --stop {hidden[0]!r} alone"
            )
        else:
            strings.append(stop)
    return strings, ids


def room_for_answers(options: Generate, prompts: "list[np.ndarray]", config: "ModelConfig") -> int:
    """Longest answer, in tokens; the default is cut to the room that the longest prompt leaves."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    longest = max(map(len, prompts))
    room = config.max_position - longest
    if room >= DEFAULT_NEW_TOKENS:
        return DEFAULT_NEW_TOKENS
    if room > 0:
        note(
            f"at most {room} new tokens: the model's max_position is {config.max_position}, the "
            f"longest prompt has {longest}"
        )
    return max(room, 1)


# ---- Generation ----------------------------------------------------------------------------------


def generate(options: Generate, source: "Weights", layout: "Layout") -> int:
    """Answer every prompt."""
    from generation import experts
    from generation.engine import Generator
    from runtime.start import is_first_process

    tokenizer = load_tokenizer(source)
    if is_first_process():
        for line in said_of_sampling(options.checkpoint, options.sampling):
            note(line)
    prompts = encode_prompts(options, source, tokenizer)
    choices: dict[str, Speculation] = {"off": False, "on": True, "auto": "auto"}
    speculate = choices[options.speculate]
    config = model_to_load(source.config, bool(speculate))
    saved = options.experts.save_expert_load
    has_experts = bool(config.num_moe_layers or config.mtp_depth)
    experts.check_options(options.experts, has_experts)
    placement, about = experts.redundant_experts(
        options.experts, config, source.config.mtp_depth, layout
    )
    more = {"placement": placement, "count_load": saved is not None}
    generator = Generator(config, make_recipe(options, config, layout), layout, **more)
    new_tokens = room_for_answers(options, prompts, config)
    generator.check(prompts, new_tokens, speculate)
    stops, ends = stops_of(options, tokenizer)
    eos_ids = *end_ids(source, tokenizer), *ends

    def decode(ids: Sequence[int]) -> str:
        if tokenizer is None or options.prompt_ids:
            return "".join(f",{i}" for i in ids)
        return tokenizer.decode([i for i in ids if i not in eos_ids], skip_special=True)

    streams = [TextStream(decode, stops) for _ in prompts]
    see = images_to_read(options, config, prompts)
    weights = generator.prepare(source.load(generator.abstract_weights), consume=True)
    given = see(generator, weights)
    drawn_by = options.sampling, new_tokens, eos_ids, speculate
    session = generator.start(weights, prompts, *drawn_by, given)
    first = "," if options.prompt_ids else ""
    answers = Answers(len(prompts), first, quiet=not is_first_process())
    while not session.done:
        for row, ids in enumerate(session.advance()):
            answers.add(row, streams[row].push(ids.tolist()))
            if streams[row].stopped and not session.finished[row]:
                session.finish(row)
            if session.finished[row] and not answers.complete[row]:
                answers.add(row, streams[row].close())
                answers.end(row)
    if is_first_process():
        note(session.stats.report())
        if about:
            note(about)
        if saved and session.expert_load is not None:
            experts.write_load(saved, session.expert_load)
            note(f"wrote {saved}: tokens per expert {list(session.expert_load.shape)}")
    return 0


def images_to_read(options: Generate, config: "ModelConfig", prompts: "list[np.ndarray]"):
    """A function from generator and weights to what prompts read in their image places. The files
    are read at once: what is wrong with them need not wait for the weights."""
    from vision.command import read_images, seen_by_all

    if not options.pictures.image:
        return lambda generator, weights: None
    pixels_NCHW = read_images(options.pictures.image, config, prompts, note)
    return lambda generator, weights: seen_by_all(generator, weights, prompts, pixels_NCHW)


def draw(options: Generate, source: "Weights", layout: "Layout") -> int:
    """Draw images of every description."""
    from generation.engine import Generator
    from runtime.start import is_first_process
    from vision.command import draw_command

    def say(line: str) -> None:
        if is_first_process():
            note(line)

    config = model_to_load(source.config, False)
    generator = Generator(config, make_recipe(options, config, layout), layout)
    tokenizer = load_tokenizer(source)
    asked = options.pictures, options.sampling
    draw_command(*asked, source, generator, tokenizer, say, is_first_process())
    return 0


def make_recipe(options: Common, config: "ModelConfig", layout: "Layout") -> "Recipe":
    """Types and kernels; says which hot paths go where."""
    from model.kernels import choose
    from model.recipe import Recipe
    from runtime.start import is_first_process

    choice = choose(options.kernels, config, options.dtype, layout)
    if is_first_process():
        note("\n".join(f"kernels: {line}" for line in choice.describe()))
    return Recipe(options.dtype, kernels=choice.kernels)


def model_to_load(config: "ModelConfig", with_mtp: bool) -> "ModelConfig":
    """The model without MTP modules unless they are asked for: they are billions of weights."""
    return config if with_mtp else dataclasses.replace(config, mtp_depth=0)


# ---- Scoring -------------------------------------------------------------------------------------


def score(options: Score, source: "Weights", layout: "Layout") -> int:
    """Logits of given tokens, or their loss."""
    import numpy as np

    from generation.engine import Generator
    from generation.score import NpyWriter, Scorer, check_ids, nats, output_paths
    from runtime.start import is_first_process

    if options.mtp and not source.config.mtp_depth:
        raise ValueError("the model has no MTP module; score it without --mtp")
    config = model_to_load(source.config, options.mtp)
    recipe = make_recipe(options, config, layout)
    ids_BT = check_ids(read_tokens(options.tokens), config, str(options.tokens))
    B, T = ids_BT.shape
    depths = config.mtp_depth
    if options.out is None and T < 2:
        raise ValueError(f"{options.tokens} holds one token per sequence; a loss needs two")
    scorer = Scorer(config, recipe, layout, options.mtp)
    sight = images_to_score(options, config, ids_BT)
    paths = output_paths(options.out, depths) if options.out and is_first_process() else []
    writer = NpyWriter(paths, (B, T, config.vocab_size))
    totals = np.zeros(1 + depths)
    with writer:
        weights = source.load(Generator(config, recipe, layout).abstract_weights)
        for first in range(0, B, scorer.rows):
            rows_BT = ids_BT[first : first + scorer.rows]
            heads = scorer.logits(weights, rows_BT, sight(first, len(rows_BT)))
            if paths:
                writer.append(heads)
            elif not options.out:
                totals += [nats(head, rows_BT, k) for k, head in enumerate(heads, 1)]
    if paths:
        note(f"wrote {', '.join(map(str, paths))}: float32 [{B}, {T}, {config.vocab_size}]")
    if options.out or not is_first_process():
        return 0
    for k, total in enumerate(totals, 1):
        targets = B * max(0, T - k)
        loss = total / targets if targets else math.nan
        perplexity = math.exp(loss) if not loss > 700 else math.inf
        name = "" if k == 1 else f"MTP module {k - 1}: "
        print(f"{name}loss {loss:.6f} nats/token, perplexity {perplexity:.4f}, {targets} targets")
    return 0


def images_to_score(options: Score, config: "ModelConfig", ids_BT: "np.ndarray"):
    """A function from first row and number of rows to what these read beside their ids."""
    from vision.command import pixels_to_score

    if options.pixels is None:
        return lambda first, count: None
    return pixels_to_score(options.pixels, config, ids_BT)


def read_tokens(path: Path) -> "np.ndarray":
    """The array of a .npy file; ValueError for anything else."""
    import numpy as np

    if not path.is_file():
        raise ValueError(f"--tokens {path}: no such file; give a .npy of int32 [B, T]")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers ({error})") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays; give a .npy of int32 [B, T]")
    return array


if __name__ == "__main__":
    sys.exit(main())
