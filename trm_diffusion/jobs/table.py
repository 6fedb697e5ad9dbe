"""The table of jobs: what each --mode runs.

Each function takes the parsed flags (flags.py) and returns the exit code. Jobs are imported when they run, so that a
mode does not load the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from trm_diffusion.errors import EXIT_USER_ERROR, UserError
from trm_diffusion.readers.paths import any_path


class Job(NamedTuple):
    run: Callable[[Any], int]
    one_process: bool = False  # only process 0 runs it
    shared: bool = False  # --process_index and --process_count can share it without a coordinator


def _config(options):
    """The resolved config of the experiment."""
    from trm_diffusion.config import resolve

    if options.config is None:
        raise UserError(f"--mode={options.mode} needs --config=FILE, an experiment such as configs/digits.py")
    return resolve(options.config)


def _require(options, *names: str) -> list:
    """The values of these flags. Raises UserError if one is missing."""
    for name in names:
        if not options[name].value:
            raise UserError(f"--mode={options.mode} on files needs --{name}; see --help")
    return [options[name].value for name in names]


def _on_run(options, *jobs: Callable) -> int:
    """Runs jobs, functions of (config, workdir, stop), one after the other."""
    from trm_diffusion.runtime.devices import use_compilation_cache
    from trm_diffusion.runtime.signals import StopRequest

    config = _config(options)
    workdir = any_path(options.workdir or f"runs/{config.name}")
    use_compilation_cache(options.compilation_cache, workdir)
    with StopRequest() as stop:
        for job in jobs:
            job(config, workdir, stop)
    return 0


def _train(options) -> int:
    from trm_diffusion.jobs.evaluate import evaluate
    from trm_diffusion.jobs.sample import sample
    from trm_diffusion.jobs.train import train

    return _on_run(options, train, sample, evaluate)


def _sample(options) -> int:
    from trm_diffusion.jobs.export_images import export
    from trm_diffusion.jobs.export_prompts import export_prompts
    from trm_diffusion.jobs.sample import sample
    from trm_diffusion.run.prompts import read_prompts

    out = options.out or ""
    if options.num:
        return _on_run(options, lambda *run: export(*run, count=options.num, out=out))
    if options.export:
        suite = dict(benchmark=options.export, prompts=options.prompts, out=out)
        return _on_run(options, lambda *run: export_prompts(*run, **suite))
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    return _on_run(options, lambda *run: sample(*run, prompts=prompts, context=options.context or ""))


def _evaluate(options) -> int:
    if not options.images:
        from trm_diffusion.jobs.evaluate import evaluate

        return _on_run(options, evaluate)
    from trm_diffusion.jobs.evaluate_images import evaluate_images

    evaluate_images(
        *_require(options, "images", "reference", "inception"),
        out=options.out or "",
        image_size=options.image_size,
        precision_dtype=options.precision_recall_dtype,
    )
    return 0


def _reference(options) -> int:
    from trm_diffusion.jobs.evaluate_images import make_reference

    make_reference(*_require(options, "images", "inception", "out"), image_size=options.image_size)
    return 0


def _analyze(options) -> int:
    from trm_diffusion.jobs.analyze import analyze

    return _on_run(options, analyze)


def _trace(options) -> int:
    from trm_diffusion.jobs.trace import trace

    return _on_run(options, lambda *run: trace(*run, context=options.context or ""))


def _prepare(options) -> int:
    from trm_diffusion.jobs.prepare_latents import prepare
    from trm_diffusion.runtime.signals import StopRequest

    size = 5000 if options.images_per_shard is None else options.images_per_shard
    with StopRequest(together=False) as stop:
        prepare(_config(options), options.out or "", stop, images_per_shard=size, **_share(options))
    return 0


def _encode(options) -> int:
    from trm_diffusion.jobs.encode_text import encode
    from trm_diffusion.runtime.signals import StopRequest

    size = 100 if options.images_per_shard is None else options.images_per_shard
    prompts = options.prompts or ""
    with StopRequest(together=False) as stop:
        encode(_config(options), options.out or "", stop, prompts=prompts, items_per_shard=size, **_share(options))
    return 0


def _share(options) -> dict:
    return dict(process_index=options.process_index, process_count=options.process_count)


def _verify(options) -> int:
    from trm_diffusion.jobs.verify_data import verify

    config = None if options.config is None else _config(options)
    return 0 if verify(options.out or "", config) else EXIT_USER_ERROR


def _compare(options) -> int:
    from trm_diffusion.jobs.compare import compare

    compare(*_require(options, "evaluations", "out"))
    return 0


def _convert(options) -> int:
    from trm_diffusion.jobs.convert_weights import convert

    convert(*(options[name].value for name in ("from", "to", "layout", "to-layout", "dtype", "merge")))
    return 0


def _compile(options) -> int:
    from trm_diffusion.jobs.compile_ahead import compile_ahead

    return 0 if compile_ahead(_config(options), options.topology, options.slices, options.job) else 1


def _doctor(options) -> int:
    from trm_diffusion.jobs.doctor import doctor

    return 0 if doctor() else 1


JOBS = {
    "train": Job(_train),
    "sample": Job(_sample),
    "evaluate": Job(_evaluate),
    "analyze": Job(_analyze),
    "trace": Job(_trace),
    "prepare": Job(_prepare, shared=True),
    "encode": Job(_encode, shared=True),
    "verify": Job(_verify, one_process=True),
    "reference": Job(_reference),
    "compare": Job(_compare, one_process=True),
    "convert": Job(_convert, one_process=True),
    "compile": Job(_compile, one_process=True),
    "doctor": Job(_doctor),
}
