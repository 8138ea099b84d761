"""Train one small language model per objective, on the same text from the same start, and compare them.

    python examples/pretrain.py                                    # "ntp" and "ntp + nitp", about five minutes
    python examples/pretrain.py --data my.txt --objectives "ntp" "ntp + 0.5*nitp(target_layer=2)"

Each run leaves checkpoint.pt, model.safetensors (the plain model), steps.csv and validation.csv in a folder of
its own under --out; comparison.png lies beside them. Needs rich, matplotlib and safetensors.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nitp_ops import BackendError
from nitp_ops.objectives import Spec, SpecError
from nitp_ops.objectives import parse as parse_spec
from pretraining import report
from pretraining.checkpoint import load_checkpoint
from pretraining.data import Corpus, load_corpus
from pretraining.evaluate import HeldOut
from pretraining.failure import BadInput, Failure, Interrupted
from pretraining.fused_head import HeadCost, compare
from pretraining.loop import prepare, train
from pretraining.options import Options, parse
from pretraining.picture import draw
from pretraining.run import Run, backend_for, check, refuse_another_run

HEAD_SHAPE = {"rows": 1024, "dim": 256, "vocab": 151_936, "dtype": "float32"}
PROMPT = b"\n"
SAMPLE_BYTES = 160


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit code."""
    try:
        compare_objectives(parse(arguments))
        return 0
    except SpecError as error:
        return _complain(*error.problems, code=BadInput.exit_code)
    except Interrupted as error:
        again = shlex.join([Path(sys.executable).name, *sys.argv, *(["--resume"] * ("--resume" not in sys.argv))])
        return _complain(f"{error}; continue with: {again}", code=error.exit_code)
    except Failure as error:
        return _complain(str(error), code=error.exit_code)
    except BackendError as error:
        return _complain(" ".join(str(error).split()), code=Failure.exit_code)
    except OSError as error:
        return _complain(
            f"{error.filename}: {error.strerror}; choose another --out" if error.filename else str(error),
            code=Failure.exit_code,
        )
    except KeyboardInterrupt:
        return _complain("stopped at once; --resume continues from the last checkpoint", code=Interrupted.exit_code)


def compare_objectives(options: Options) -> None:
    """One run per objective, then the table, the sentences, the picture."""
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    specs = [checked_spec(text, options) for text in options.objectives]
    corpus = load_corpus(options.data, options.context, options.batch * options.accumulate)
    runs = list(zip(options.objectives, specs, folder_names(specs), strict=True))
    if options.resume:
        check_resumable(options, corpus, {name: spec for _, spec, name in runs})
    console.print(corpus.description)
    if backend_for(options.device) is not None:
        console.print(f"no row kernels serve {options.device} here: the objectives run as plain PyTorch equations")
    outcomes, samples = [], []
    for text, spec, name in runs:
        run = Run(text, spec, options, corpus, options.out / name)
        console.print(f"\n{prepare(run, options.resume)}\n{run.objective.explain()}")
        outcomes.append(report.Outcome.of(run, _train(run, console)))
        samples.append((text, sample(run)))
    for text, continuation in samples:
        console.print(f"\nsampled from {text}:\n{continuation}")
    console.print(report.table(outcomes))
    for sentence in report.sentences(outcomes):
        console.print(sentence)
    costs = _head_costs(options, console) if options.fused_head else []
    picture = options.out / "comparison.png"
    draw(picture, outcomes, costs)
    console.print(f"\ncurves: {picture}; tables and weights: {options.out}/<objective>/")


def checked_spec(text: str, options: Options) -> Spec:
    """The spec of an expression, refused before anything trains if this model cannot serve it."""
    try:
        check(spec := parse_spec(text), options)
    except SpecError as error:
        raise SpecError(f'--objectives "{text}": {problem}' for problem in error.problems) from error
    return spec


def check_resumable(options: Options, corpus: Corpus, specs: dict[str, Spec]) -> None:
    """Refuse to resume, before anything trains, where a checkpoint is missing, damaged or of another run."""
    found = {name: path for name in specs if (path := options.out / name / "checkpoint.pt").exists()}
    if not found:
        raise BadInput(f"--resume: {options.out} holds no checkpoint of {' or '.join(specs)}; start without it")
    for name, path in found.items():
        refuse_another_run(path, load_checkpoint(path), specs[name], options, corpus)


def folder_names(specs: list[Spec]) -> list[str]:
    """The labels of each spec, joined; a number follows where an earlier run has the same."""
    names: list[str] = []
    for spec in specs:
        plain = "-".join(str(term.label) for term in spec.terms)
        repeats = sum(name == plain or name.startswith(f"{plain}.") for name in names)
        names.append(f"{plain}.{repeats + 1}" if repeats else plain)
    return names


def sample(run: Run) -> str:
    """A little text that the model continues by itself."""
    prompt = torch.tensor(list(PROMPT), device=run.device)
    tokens = run.model.sample(prompt, SAMPLE_BYTES, temperature=0.8, seed=run.options.seed)
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    # A young model emits escape sequences too: none of them may reach the terminal.
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _train(run: Run, console: Console) -> HeldOut:
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    ]
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(run.name, total=run.options.steps, completed=run.done, loss="-")

        def on_step(row: dict[str, float]) -> None:
            progress.update(task, advance=1, loss=f"{row['loss']:.3f}")

        def on_look(look: HeldOut) -> None:
            latent = "".join(f"  {label} {x.loss:.4f} (floor {x.floor:.4f})" for label, x in look.latent.items())
            progress.console.print(
                f"step {look.step:>5}  held-out cross-entropy {look.cross_entropy:.4f}{latent}"
                f"  effective rank {look.effective_rank:.1f}  mean cosine {look.mean_cosine:.3f}"
            )

        return train(run, on_step, on_look)


def _head_costs(options: Options, console: Console) -> list[HeadCost]:
    try:
        device = options.device if backend_for(options.device) is None else "cpu"
        costs = compare(**HEAD_SHAPE, device=device, threads=torch.get_num_threads())
    except RuntimeError as error:
        raise Failure(str(error)) from error
    console.print(report.head_table(costs))
    console.print(report.head_sentence(costs))
    return costs


def _complain(*lines: str, code: int) -> int:
    for line in lines:
        print(f"pretrain: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
