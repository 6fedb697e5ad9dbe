"""The command line: flags in, one job run, an exit code out.

0   done
1   what was checked is not so: --mode=doctor, and --mode=compile of a program that does not fit
2   the user's mistake, told in one line
75  asked to stop (SIGTERM or Ctrl-C) and everything is saved, or other processes of the run did not come:
    start the same command again
"""

import functools
import re
import sys
import traceback

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from trm_diffusion.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, Interrupted, UserError

MODES = (
    "train", "sample", "evaluate", "analyze", "prepare", "encode", "verify", "reference", "compare", "convert",
    "compile", "doctor",
)  # fmt: skip
ONE_PROCESS = ("verify", "compare", "convert", "compile")  # process 0 alone does these
PLATFORMS = ("", "cpu", "cuda", "tpu")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: configs/NAME.py or configs/NAME.py:OPTION=VALUE,..."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, runs/NAME by default; may be gs://...")
MODE = flags.DEFINE_enum("mode", "train", MODES, "train (then sample and evaluate), or one job alone")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to draw with --mode=sample; may be given several times")
PROMPTS = flags.DEFINE_string(
    "prompts", None, 'File of such texts, one a line, or JSON lines with "prompt" (.jsonl), or a folder of .txt files'
)
EXPORT = flags.DEFINE_enum(
    "export", "", ("", "geneval", "dpg"), "With --mode=sample: draw the benchmark's --prompts, in its official layout"
)
SOURCE = flags.DEFINE_string("from", "", "convert: a run, a converted directory, published weights, or a hub id")
DESTINATION = flags.DEFINE_string("to", "", "convert: the directory to write")
LAYOUT = flags.DEFINE_string("layout", "", "convert: the layout of published weights, where their names do not tell")
TO_LAYOUT = flags.DEFINE_string(
    "to-layout",
    "",
    "convert: published names, or adapter (gates and experts alone); else a directory to start from",
)
DTYPE = flags.DEFINE_enum(
    "dtype", "", ("", "float32", "float16", "bfloat16"), "convert: of the result; else the source's"
)
MERGE = flags.DEFINE_bool("merge", False, "convert: put a plain LoRA into the base weights first")
IMAGES = flags.DEFINE_string("images", None, "Folder or .npz of images: evaluate these, or make a reference of them")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "Crop the pictures of --images to this size first, as ADM does")
REFERENCE = flags.DEFINE_string("reference", None, "Reference .npz that --images are compared with")
INCEPTION = flags.DEFINE_string(
    "inception", None, "Weights of the FID Inception network: .safetensors, .pth, or converted"
)
PRECISION_RECALL_DTYPE = flags.DEFINE_enum(
    "precision_recall_dtype", "float32", ("float32", "float16"), "Of the distances between features"
)
EVALUATIONS = flags.DEFINE_list("evaluations", None, "evaluation.json files to compare, separated by commas")
NUM = flags.DEFINE_integer("num", 0, "With --mode=sample: draw so many images as PNG files, instead of a grid")
OUT = flags.DEFINE_string(
    "out",
    None,
    "What to write: samples (folder or .npz), evaluation, reference or comparison; the directory of prepare or encode",
)
IMAGES_PER_SHARD = flags.DEFINE_integer(
    "images_per_shard", None, "Images in a shard: prepare 5,000; encode 100, whose captions take megabytes each"
)
TOPOLOGY = flags.DEFINE_string("topology", "", "compile: the TPU pod to compile for, such as v5p:4x4x4")
SLICES = flags.DEFINE_integer("slices", 1, "compile: so many slices of that pod, with copies of the model over them")
JOB = flags.DEFINE_enum("job", "train", ("train", "sample"), "compile: the step of this job")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, for several processes as one run; found by itself on TPU pods and SLURM"
)
PROCESS_INDEX = flags.DEFINE_integer(
    "process_index",
    None,
    "Which of the run's processes this is; or, without a coordinator, of those that share a prepare or encode",
)
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes they are")
CLUSTER = flags.DEFINE_enum("cluster", "auto", ("auto", "none"), "none: do not look for other processes in a cluster")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all processes of the run to come")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", "", "Directory of compiled programs, or none; .compilation_cache beside the workdir by default"
)
PLATFORM = flags.DEFINE_enum("platform", "", PLATFORMS, "Refuse to run on anything else; any device by default")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.ERROR)  # the libraries'; what this program says is its own
    try:
        parse_flags(argv)
        return run(MODE.value, PLATFORM.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return after_error(EXIT_USER_ERROR)
    except Interrupted as error:
        print(f"{error}; start the same command again to go on", file=sys.stderr)
        return EXIT_RESUMABLE
    except Exception:  # noqa: BLE001  as Python itself would, but for other processes that may wait for this one
        traceback.print_exc()
        return after_error(1)


def after_error(code: int) -> int:
    from trm_diffusion.runtime.processes import end_after_error

    return end_after_error(code)


def parse_flags(argv: list[str]) -> None:
    """Parses the flags. Raises UserError for anything wrong in them or in the config file that they name."""
    try:
        rest = flags.FLAGS(argv)[1:]
        _ = CONFIG.value and CONFIG.value.to_dict()  # a file that cannot be read is noticed only here
    except Exception as error:  # noqa: BLE001  whatever the libraries raise, the command line is what is wrong
        raise _explained(error, argv) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --name=value (see --help)")


def _explained(error: Exception, argv: list[str]) -> UserError:
    """A library's error about the command line or the config file, as one line that says what to do."""
    from trm_diffusion.config import field_exists, unknown_field

    text, command = str(error), "\n".join(argv)
    for path in re.findall(r"^--?(config\.[\w.]+)", command, re.MULTILINE):
        if not field_exists(path):
            return unknown_field(path)
    file = (re.findall(r"^--?config[=\n]([^:\n]+)", command, re.MULTILINE) or [""])[0]
    if file and not epath.Path(file).exists():
        return UserError(f"--config={file}: no such file; the experiments are in configs/")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "whilst parsing config file" in text:  # the library quotes the whole traceback; its last line says what it is
        reason = lines[-1].removeprefix("trm_diffusion.errors.UserError: ")
        if "positional argument" in reason:
            reason = "this experiment takes no options after the colon"
        return UserError(f"{file}: {reason}")
    return UserError(lines[0])


def run(mode: str, platform: str) -> int:
    """Runs one job of the parsed flags."""
    from trm_diffusion.runtime.devices import require_platform, use_compilation_cache
    from trm_diffusion.runtime.processes import is_first, join, several, wait_for_all

    index, count = PROCESS_INDEX.value, PROCESS_COUNT.value
    join(COORDINATOR.value, count, index, detect=CLUSTER.value == "auto", timeout=START_TIMEOUT.value)
    if not several() and mode not in ("prepare", "encode") and (index is not None or count not in (None, 1)):
        raise UserError("--process_index and --process_count need --coordinator=HOST:PORT, the same for all processes")
    if mode in ONE_PROCESS and not is_first():
        return 0
    require_platform(platform)
    if mode not in ONE_PROCESS:
        wait_for_all("the job begins")
    if mode == "doctor":
        from trm_diffusion.jobs.doctor import doctor

        return 0 if doctor() else 1
    if IMAGES.value or mode in ("reference", "compare", "convert"):
        return run_on_files(mode)
    if mode in ("prepare", "encode", "verify"):
        return run_on_latents(mode)

    from trm_diffusion.config import resolve
    from trm_diffusion.jobs.analyze import analyze
    from trm_diffusion.jobs.compile_ahead import compile_ahead
    from trm_diffusion.jobs.evaluate import evaluate
    from trm_diffusion.jobs.export_images import export
    from trm_diffusion.jobs.export_prompts import export_prompts
    from trm_diffusion.jobs.sample import sample
    from trm_diffusion.jobs.train import train
    from trm_diffusion.run.prompts import read_prompts
    from trm_diffusion.runtime.signals import StopRequest

    if CONFIG.value is None:
        raise UserError("no experiment given; add --config=configs/digits.py, or another file of configs/")
    config = resolve(CONFIG.value)
    if mode == "compile":
        return 0 if compile_ahead(config, TOPOLOGY.value, SLICES.value, JOB.value) else 1
    if EXPORT.value and (mode != "sample" or not PROMPTS.value or PROMPT.value or NUM.value):
        raise UserError(f"--export={EXPORT.value} goes with --mode=sample and --prompts, the benchmark's own, alone")
    prompts = PROMPT.value + (read_prompts(PROMPTS.value) if PROMPTS.value and not EXPORT.value else [])
    if prompts:
        if mode != "sample":
            raise UserError("--prompt and --prompts are for --mode=sample")
        sample = functools.partial(sample, prompts=prompts)
    workdir = epath.Path(WORKDIR.value or f"runs/{config.name}")
    use_compilation_cache(COMPILATION_CACHE.value, workdir)
    if NUM.value:
        if mode != "sample" or NUM.value < 0 or prompts:
            raise UserError(f"--num={NUM.value} counts images; it goes with --mode=sample, and not with prompts")
        sample = functools.partial(export, count=NUM.value, out=OUT.value or "")
    if EXPORT.value:
        sample = functools.partial(export_prompts, benchmark=EXPORT.value, prompts=PROMPTS.value, out=OUT.value or "")
    jobs = {"train": (train, sample, evaluate), "sample": (sample,), "evaluate": (evaluate,), "analyze": (analyze,)}
    with StopRequest() as stop:
        for job in jobs[mode]:
            job(config, workdir, stop)
    return 0


def run_on_latents(mode: str) -> int:
    """Makes a directory of latents or of encoded text, or checks one."""
    from trm_diffusion.config import resolve
    from trm_diffusion.jobs.encode_text import encode
    from trm_diffusion.jobs.prepare_latents import prepare
    from trm_diffusion.jobs.verify_data import verify
    from trm_diffusion.runtime.signals import StopRequest

    config = None if CONFIG.value is None else resolve(CONFIG.value)
    if mode == "verify":
        return 0 if verify(OUT.value or "", config) else EXIT_USER_ERROR
    if config is None:
        raise UserError(f"--mode={mode} needs --config, whose config.data it reads")
    share = dict(process_index=PROCESS_INDEX.value, process_count=PROCESS_COUNT.value)
    size, out = IMAGES_PER_SHARD.value, OUT.value or ""
    with StopRequest(together=False) as stop:
        if mode == "prepare":
            prepare(config, out, stop, images_per_shard=5000 if size is None else size, **share)
        else:
            items_per_shard = 100 if size is None else size
            encode(config, out, stop, prompts=PROMPTS.value or "", items_per_shard=items_per_shard, **share)
    return 0


def run_on_files(mode: str) -> int:
    """Runs a job that needs no experiment, only files."""
    from trm_diffusion.jobs.compare import compare
    from trm_diffusion.jobs.convert_weights import convert
    from trm_diffusion.jobs.evaluate_images import evaluate_images, make_reference

    def need(*named: flags.FlagHolder) -> list:
        for flag in named:
            if not flag.value:
                raise UserError(f"--mode={mode} on files needs --{flag.name}; see --help")
        return [flag.value for flag in named]

    if mode == "convert":
        convert(SOURCE.value, DESTINATION.value, LAYOUT.value, TO_LAYOUT.value, DTYPE.value, MERGE.value)
    elif mode == "compare":
        compare(*need(EVALUATIONS, OUT))
    elif mode == "reference":
        make_reference(*need(IMAGES, INCEPTION, OUT), image_size=IMAGE_SIZE.value)
    elif mode == "evaluate":
        evaluate_images(
            *need(IMAGES, REFERENCE, INCEPTION),
            out=OUT.value or "",
            image_size=IMAGE_SIZE.value,
            precision_dtype=PRECISION_RECALL_DTYPE.value,
        )
    else:
        raise UserError(f"--images goes with --mode=evaluate and --mode=reference, not with {mode}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
