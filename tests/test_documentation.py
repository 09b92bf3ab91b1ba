"""What README.md and the other pages say is what the code does: flags, tables, commands, links, printed lines."""

import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from test_layers import LAYERS, PACKAGE, files, part_of

from catdog import bundle, cli, errors, images, metrics, quantization, schema, storage
from catdog.bench.chaos import BenchChaosRecord, Outcome
from catdog.bench.nightly_chaos import BenchNightlyChaosRecord
from catdog.bench.plan import BenchPlanRecord
from catdog.bench.rounds import spread
from catdog.bench.serve_record import CONTENDERS, NUM_CLIENTS, BenchServeRecord, Load
from catdog.bench.train_record import BenchTrainRecord, Figure
from catdog.config import flag
from catdog.dataset.pipeline import PrepareRecord
from catdog.demo import DemoRecord
from catdog.engines import GOLDEN_TOLERANCES
from catdog.evaluation import EvaluationRecord, FloatFigures
from catdog.inference.books import Books, RunRecord
from catdog.inference.compaction import CompactRecord
from catdog.inference.comparison import Comparison, Difference
from catdog.records import Record, percent
from catdog.serving import problems
from catdog.serving import service as serving_limits
from catdog.training import TrainRecord
from catdog.tuning import TuneRecord
from catdog.tuning.space import SETTINGS

PROJECT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "catdog/default_model/README.md")
README = (PROJECT / "README.md").read_text()
CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text()

OTHER_FLAGS = {"--constraint", "--help", "--version", "--working-dir", "--logdir", "--data-binary"}
"""Flags on the pages that are not of one command of catdog: pip's, Ray's, TensorBoard's, curl's, `catdog --version`."""

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_of(page: str) -> str:
    return (PROJECT / page).read_text()


def console_lines(text: str) -> list[str]:
    """The lines of all console blocks, without the blocks' own indentation."""
    lines: list[str] = []
    for language, block in FENCED.findall(text):
        if language == "console":
            first = block.split("\n")[0]
            indent = len(first) - len(first.lstrip())
            lines += [line[indent:] for line in block.rstrip().split("\n")]
    return lines


def commands(text: str) -> list[str]:
    """What the console blocks show that a user types."""
    return [line.removeprefix("$ ") for line in console_lines(text) if line.startswith("$ ")]


def table(text: str, first_header: str) -> list[list[str]]:
    """The cells of a Markdown table, which is found by its first column's header."""
    lines = text.split("\n")
    opening = f"| {first_header} |" if first_header else "| | |"
    (start,) = (index for index, line in enumerate(lines) if line.startswith(opening))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def codes(cell: str) -> list[str]:
    return CODE.findall(cell)


# Links, targets of make, names.


def anchors(text: str) -> set[str]:
    """The names under which GitHub finds a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file(page: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (PROJECT / page).parent / name if name else PROJECT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(target)
    assert not broken, f"{page} links to what is not there: {broken}"


def test_every_target_of_make_is_in_the_makefile(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    spans = [*CODE.findall(text_of(page)), *commands(text_of(page))]
    named = {name for span in spans for name in re.findall(r"\bmake ([a-z][\w-]*)", span)}
    assert named <= targets, f"{page} names targets that the Makefile lacks: {sorted(named - targets)}"


def test_the_pages_speak_of_files_that_are_there(page: str) -> None:
    """`tests/test_images.py`, `catdog/images.py`, ... in running text and in code."""
    if page == "CHANGELOG.md":
        return  # it may speak of files that are gone
    named = set(re.findall(r"\b(?:catdog|tests|jobs|cluster)/[\w/.-]+\.(?:py|yaml|md)\b", text_of(page)))
    missing = sorted(name for name in named if not (PROJECT / name).exists())
    assert not missing, f"{page} names files that are not there: {missing}"


# The command line.


def all_flags() -> set[str]:
    found = {flag(field.name) for field in fields(cli.CommonFlags)}
    for command in cli.COMMANDS.values():
        for field in fields(command.config_type):
            found.add(flag(field.name))
            if field.default is True:
                found.add(flag(f"no_{field.name}"))
    return found


def test_every_flag_on_the_pages_is_one_that_a_command_takes(page: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(page)))
    unknown = sorted(named - all_flags() - OTHER_FLAGS)
    assert not unknown, f"{page} names flags that no command takes: {unknown}"


def parsed(line: str) -> str | None:
    """Parse a command line of catdog, also inside `ray job submit`; the command's name, None for another program's."""
    args = shlex.split(line)
    if args[:3] == ["ray", "job", "submit"]:
        args = args[args.index("--") + 1 :]
    if args[:2] == ["python", "-m"] and args[2].startswith("jobs."):
        job = args[2].removeprefix("jobs.")
        assert (PROJECT / "jobs" / f"{job}.py").exists(), f"{line}: jobs/ has no {job}.py"
        args = ["catdog", job, *args[3:]]
    if args[0] != "catdog":
        return None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # --help
        return cli.parse(args[1:])[0]
    return ""


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_parser_takes_every_command_of_the_console_blocks(name: str) -> None:
    for line in commands(text_of(name)):
        try:
            parsed(line)
        except errors.UsageError as error:
            pytest.fail(f"{name} shows a command that catdog refuses: {line}: {error}")


def test_the_readme_shows_every_job_at_work() -> None:
    shown = {parsed(line) for line in commands(README)}
    assert shown >= cli.COMMANDS.keys() - {"demo", "verify"}  # `make demo` stands for one; the other is in the text


def test_the_examples_of_the_help_are_parsed() -> None:
    for name, command in cli.COMMANDS.items():
        assert parsed(command.example) == name


# The tables.

TYPES = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "binary": pa.binary(),
    "int8": pa.int8(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "timestamp[us, UTC]": pa.timestamp("us", tz="UTC"),
}
"""What the README calls the types of columns."""


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("column of `train/`, `val/`, `test/`", schema.DATASET_SCHEMA),
        ("column of the predictions", schema.PREDICTIONS_SCHEMA),
    ],
)
def test_the_columns_are_the_schemas(header: str, expected: pa.Schema) -> None:
    """In the schema's order. A row of the table may hold several columns: of one type, or with a type for each."""
    described = []
    for names, types, *_ in table(README, header):
        columns = codes(names)
        kinds = [types] if types in TYPES else types.split(", ", len(columns) - 1)
        described += list(zip(columns, kinds * len(columns) if len(kinds) == 1 else kinds, strict=True))
    assert [name for name, _ in described] == expected.names, f"README's table `{header}` lacks, or invents, columns"
    wrong = [
        f"{name} is {expected.field(name).type}" for name, kind in described if TYPES[kind] != expected.field(name).type
    ]
    assert not wrong, f"README's table `{header}` gives other types than catdog.schema: {wrong}"


def test_the_rules_for_null_are_the_schemas() -> None:
    """A column that may be null on error says so; one that may not, does not."""
    for names, _, text in table(README, "column of the predictions"):
        for name in codes(names):
            if "null" in text:
                assert schema.PREDICTIONS_SCHEMA.field(name).nullable, f"README says that {name} may be null"


def test_the_error_codes_are_the_schemas() -> None:
    assert [codes(row[0])[0] for row in table(README, "error code")] == list(schema.ERROR_CODES)


def test_the_codes_of_requests_are_those_of_the_service() -> None:
    listed: dict[str, int] = {}
    for names, statuses, _ in table(README, "request code"):
        listed |= dict(zip(codes(names), map(int, statuses.split(", ") * 2), strict=False))
    assert listed == {code: status for code, (status, _) in problems.REQUEST_PROBLEMS.items()}
    for code, status in problems.IMAGE_STATUSES.items():
        assert re.search(rf"`{code}`[^.]* {status}", unwrapped(README)), f"README does not say the status of {code}"
    assert f"{serving_limits.MAX_HELD_BYTES // 2**20} MiB are held" in unwrapped(README)


def test_the_limits_are_those_of_the_code() -> None:
    ((_, text),) = (row for row in table(README, "error code") if row[0] == "`too_large`")
    assert f"{storage.MAX_BYTES // 2**20} MiB" in text
    assert f"{images.MAX_PIXELS:,} pixels" in text


def test_the_files_of_a_bundle_are_those_of_the_code() -> None:
    """OpenVINO's, and those of the bundle that ships, which `catdog train` wrote."""
    card, _ = bundle.read_card(None)
    irs = {name for weights in get_args(bundle.Weights) for name in bundle.ir_names(weights).values()}
    listed = [name for row in table(README, "file of a model bundle") for name in codes(row[0])]
    assert sorted(listed) == sorted({bundle.CARD_NAME, *card["files"], *irs})


def test_the_rules_for_int8_and_for_golden_logits_are_those_of_the_code() -> None:
    text = unwrapped(README)
    assert f"validation accuracy is at most {100 * quantization.MAX_ACCURACY_LOSS:.2f} points lower" in text
    assert f"log loss at most {100 * (quantization.MAX_LOG_LOSS_RATIO - 1):.0f} % higher" in text
    assert GOLDEN_TOLERANCES["bfloat16"] == GOLDEN_TOLERANCES["int8"]
    assert f"by more than {GOLDEN_TOLERANCES['float32']:g} in float32" in text
    assert f"{GOLDEN_TOLERANCES['int8']:g} in bfloat16 or int8" in text


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = [extra for row in table(README, "extra") for extra in codes(row[0])]
    assert listed == [extra for extra in extras if extra != "dev"]


def test_the_error_of_a_missing_extra_is_the_one_that_is_printed() -> None:
    error = ModuleNotFoundError("No module named 'keras'", name="keras")
    assert f"error: {cli._missing_extra(error)}" in unwrapped(README)


def exit_codes() -> set[int]:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
    raised = {each.exit_code for each in classes if issubclass(each, errors.CatdogError)}
    raised |= {record.failure_exit_code for record in Record.__subclasses__()}
    return raised | {value for name, value in vars(cli).items() if name.startswith("EXIT_")}


def test_the_exit_codes_are_those_of_the_code() -> None:
    assert {int(row[0]) for row in table(README, "exit code")} == exit_codes()


MODULES = {part_of(path) for path in files()} - {""}
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def test_the_layout_has_every_module_in_the_order_of_the_layers() -> None:
    listed = [name for row in table(README, "module") for name in codes(row[0])]
    assert sorted(listed) == sorted(MODULES), "README's layout lacks modules, or invents some"
    levels = [LEVELS[name] for name in listed]
    assert levels == sorted(levels), "README's layout is out of order"


def test_the_picture_has_every_module_in_the_order_of_the_layers() -> None:
    """The one in CONTRIBUTING.md, which has the top of the house on top."""
    (picture,) = (block for language, block in FENCED.findall(CONTRIBUTING) if language == "text")
    walls = "\n".join(re.findall(r"^ +\|(.+)\|(?:  |$)", picture, re.MULTILINE))
    drawn = [name for name in re.findall(r"\w+", walls) if name in LEVELS]
    assert sorted(drawn) == sorted(MODULES), "the picture of the house lacks modules, or has one twice"
    levels = [LEVELS[name] for name in drawn]
    assert levels == sorted(levels, reverse=True), "the picture of the house is out of order"


def test_the_ways_through_the_code_name_what_is_there() -> None:
    walked = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \| `(\w+)` \|", CONTRIBUTING, re.MULTILINE)
    assert len(walked) > 20
    for path, name in walked:
        source = (PROJECT / path).read_text()
        assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), f"{path} has no {name}"


# The lines that the commands print.


def shape(lines: list[str]) -> list[str]:
    """Lines with every number as `#` and the path in the last one left out: figures are measured again and again."""
    return [re.sub(r"\d[\d,.]*(?<![,.])", "#", line) for line in lines]


def printed(line: str) -> list[str]:
    """What the README shows that a command prints: the lines up to the next command."""
    lines = console_lines(README)
    start = lines.index(f"$ {line}") + 1
    stop = next((index for index in range(start, len(lines)) if lines[index].startswith("$ ")), len(lines))
    return lines[start:stop]


def counts(line: str) -> dict[str, int]:
    """`  errors   1 truncated, 2 empty_file`: the counts by name."""
    return {name: int(number.replace(",", "")) for number, name in re.findall(r"(\d[\d,]*) (\w+)", line)}


@dataclass(frozen=True)
class Filler:
    """Stands in the fields of a record that its summary does not read."""


def made(record_type: type[Any], **values: Any) -> Any:
    """A record with some fields; the summary must not ask for any other."""
    given = {field.name: values.pop(field.name, Filler()) for field in fields(record_type)}
    assert not values, f"{record_type.__name__} has no field {sorted(values)}"
    return record_type(**given)


ESTIMATE: metrics.Estimate = {"value": 0.5, "ci95": [0.25, 0.75]}


def prepare_record(output: str, reasons: dict[str, int]) -> PrepareRecord:
    by_class = {"cat": 1, "dog": 1}
    record: PrepareRecord = made(
        PrepareRecord,
        output=output,
        already_done=False,
        listed=2,
        kept=1,
        rejected=1,
        reasons=reasons,
        counts=dict.fromkeys(schema.SPLITS, by_class),
        num_duplicate_groups=1,
        num_conflicts=1,
        num_remarked=0,
        durations_s={"scan": 1.5},
        images_per_s=3.5,
    )
    return record


def train_record(output: str, arch: str) -> TrainRecord:
    last = {f"{split}_{name}": 0.5 for split in ("train", "val") for name in ("loss", "accuracy")}
    record: TrainRecord = made(
        TrainRecord,
        output=output,
        arch=arch,
        epochs_trained=2,
        training_seconds=3.0,
        precision="bfloat16",
        metrics=last,
        recall={"cat": 0.5, "dog": 0.5},
        best_epoch=None,
        calibration={
            "temperature": 0.5,
            "expected_calibration_error": {"before": ESTIMATE, "after": ESTIMATE},
        },
        durations_s={"compute_s": 1.0, "input_s": 1.0, "validation_s": 1.0, "checkpoint_s": 1.0},
    )
    return record


def run_record(output: str, errors: dict[str, int], *, num_ok: int = 3) -> RunRecord:
    books = Books(listed=9, ok=num_ok, error=len(errors), already_done=9 - num_ok - len(errors), duplicate=0)
    record: RunRecord = made(
        RunRecord,
        run_id="20261126T170815.928146Z-00000000",
        output=output,
        executor="inline",
        books=books,
        labels={"cat": 1, "dog": 2},
        needs_review=1,
        errors=errors,
        skipped={},
        drift=[],
        missing=[],
        durations_s={"total": 1.5},
        images_per_s=2.5,
    )
    return record


IN_FLOAT: FloatFigures = {"arithmetic": "bfloat16", "accuracy": ESTIMATE, "log_loss": ESTIMATE, "num_other_labels": 1}


def evaluation_record(output: str, files: dict[str, str], *, is_int8: bool) -> EvaluationRecord:
    record: EvaluationRecord = made(
        EvaluationRecord,
        output=output,
        files=files,
        split="test",
        num_images=4,
        confusion_matrix=[[1, 1], [1, 1]],
        accuracy=ESTIMATE,
        balanced_accuracy=ESTIMATE,
        log_loss=ESTIMATE,
        expected_calibration_error=ESTIMATE,
        roc_auc=ESTIMATE,
        in_float=IN_FLOAT if is_int8 else None,
        duration_s=1.5,
    )
    return record


def without_run_id(lines: list[str]) -> list[str]:
    return [re.sub(r"\(run \w+\.\w+-\w+\)", "(run ID)", line) for line in lines]


def check_printed(shown: list[str], record: Record) -> None:
    shown, expected = without_run_id(shown), without_run_id(record.summary())
    assert shape(shown) == shape(expected), "README shows other lines than the command prints"


def test_prepare_prints_what_the_readme_shows() -> None:
    shown = printed("catdog prepare --images train.zip --output data")
    (rejected,) = (line for line in shown if line.startswith("  rejected"))
    reasons = counts(rejected.partition(":")[2])
    assert set(reasons) <= set(schema.REJECT_REASONS)
    check_printed(shown, prepare_record("data", reasons))


def test_train_prints_what_the_readme_shows() -> None:
    command = "catdog train --data data --output model --arch efficientnet_lite2 --num-workers 2"
    shown = printed(f"{command} --review-precision 0.997")
    check_printed(shown, train_record("model", "efficientnet_lite2"))


def test_tune_prints_what_the_readme_shows() -> None:
    (line,) = (line for line in commands(README) if line.startswith("catdog tune"))
    shown = printed(line)
    settings = dict.fromkeys(re.findall(r"(\w+) [\d.e-]+", shown[3].removeprefix("  settings")), 0.5)
    row = {"trial": 1, "val_log_loss": 0.5, "val_accuracy": 0.5, "epochs": 8} | settings
    (command_line,) = (line.partition("train it")[2].strip() for line in shown if line.startswith("  train it"))
    assert parsed(command_line) == "train"
    record: TuneRecord = made(
        TuneRecord,
        output="search",
        arch="cnn",
        search_seconds=9.0,
        trials={"ok": 3, "stopped": 4, "cut": 0, "error": 0},
        num_val_images=5,
        best=row,
        recipe=row,
        command_line=command_line,
        model_id=None,
        space=settings,
    )
    check_printed(shown, record)


def test_the_settings_that_the_readme_says_can_be_searched_are_those_of_the_code() -> None:
    (named,) = re.findall(r"It may name (`learning_rate`.*?): all of them", unwrapped(README))
    assert sorted(name for name in codes(named) if name != "resnet") == sorted(SETTINGS)


def test_the_training_that_the_readme_shows_made_the_model_that_ships() -> None:
    """To the last figure: README says so."""
    card, _ = bundle.read_card(None)
    read_by_summary = (
        "arch",
        "metrics",
        "calibration",
        "epochs_trained",
        "training_seconds",
        "durations_s",
        "precision",
    )
    recall = {name: each["recall"]["value"] for name, each in card["validation"]["per_class"].items()}
    fields_of_card = {name: card[name] for name in read_by_summary}
    record: TrainRecord = made(TrainRecord, output="model", recall=recall, best_epoch=None, **fields_of_card)
    command = "catdog train --data data --output model --arch efficientnet_lite2 --num-workers 2"
    shown = printed(f"{command} --review-precision 0.997")
    assert record.summary() == shown


def test_the_page_of_the_model_that_ships_has_the_figures_of_its_card() -> None:
    card, _ = bundle.read_card(None)
    ((_, text),) = (row for row in table(text_of("catdog/default_model/README.md"), "") if row[0] == "Validation")
    num_images = card["validation"]["num_images"]
    right = card["int8"]["validation"]["accuracy"]["value"]
    assert card["int8"]["float_validation"]["accuracy"]["value"] == right
    assert text == f"{percent(right)} of {num_images:,} photographs right, in int8 and in float"


def test_evaluate_prints_what_the_readme_shows() -> None:
    shown = printed("catdog evaluate --data data --model model --output evaluation")
    card, _ = bundle.read_card(None)  # of the model that README trains
    int8 = card.get("int8")
    check_printed(shown, evaluation_record("evaluation", {}, is_int8=int8 is not None and int8["is_accepted"]))


def test_predict_prints_what_the_readme_shows() -> None:
    line = "catdog predict --images train.zip --model model --output predictions"
    shown = printed(line)
    check_printed(shown, run_record("predictions", {}))
    lines = console_lines(README)
    again = lines[len(lines) - lines[::-1].index(f"$ {line}") :][:4]
    record = run_record("predictions", {}, num_ok=0)
    check_printed(again, record)


def test_the_demo_prints_what_the_readme_shows() -> None:
    shown = printed("make demo")
    (rejected,) = (line for line in shown if line.startswith("  rejected"))
    (failed,) = (line for line in shown if line.startswith("  errors"))
    assert set(counts(failed.removeprefix("  errors"))) <= set(schema.ERROR_CODES)
    pictures = [name for name in shown if name.startswith("  catdog-demo/evaluation/")]
    record: DemoRecord = made(
        DemoRecord,
        drawings="catdog-demo/drawings",
        duration_s=9.0,
        prepare=prepare_record("catdog-demo/data", counts(rejected.partition(":")[2])),
        train=train_record("catdog-demo/model", "cnn"),
        predict=run_record("catdog-demo/predictions", counts(failed.removeprefix("  errors"))),
        evaluate=evaluation_record(
            "catdog-demo/evaluation",
            {name: name.strip() for name in pictures},
            is_int8=any(name.startswith("  in float ") for name in shown),
        ),
    )
    check_printed(shown, record)


def test_bench_train_prints_what_the_readme_shows() -> None:
    shown = printed("catdog bench train --data data --output bench")
    names = re.findall(r"`(\w+)`", inspect.getdoc(BenchTrainRecord) or "")
    record: BenchTrainRecord = made(
        BenchTrainRecord,
        output="bench",
        arch="cnn",
        image_size=150,
        num_images=2048,
        rounds=[{}] * 3,
        duration_s=9.0,
        num_workers=2,
        figures=dict.fromkeys(names, Figure(median=0.5, min=0.25, max=0.75, target=0.5)),
    )
    check_printed(shown, record)


def test_bench_chaos_prints_what_the_readme_shows() -> None:
    shown = printed("catdog bench chaos --data data --output chaos --num-kills 20")
    outcome = Outcome(val_loss=0.5, val_accuracy=0.5, wall_seconds=9.0)
    kinds = re.findall(r"\d ([a-z][a-z ]+)(?:,|\.$)", shown[0].partition(":")[2])
    record: BenchChaosRecord = made(
        BenchChaosRecord,
        output="chaos",
        num_kills=20,
        kills_by_moment=dict.fromkeys(kinds, 5),
        num_restarts=20,
        num_lost_steps=20,
        most_lost_steps=20,
        max_weight_difference=0.0,
        num_steps=1000,
        undisturbed=outcome,
        disturbed=outcome,
        config={"checkpoint_steps": 20},
    )
    check_printed(shown, record)


def test_bench_nightly_chaos_prints_what_the_readme_shows() -> None:
    (line,) = (line for line in commands(README) if line.startswith("catdog bench nightly-chaos"))
    shown = printed(line)
    (ends,) = (line for line in shown if line.startswith("  runs"))
    (kills,) = (line for line in shown if line.startswith("  killed"))
    (compacted,) = (line for line in shown if line.startswith("  compacted"))
    record: BenchNightlyChaosRecord = made(
        BenchNightlyChaosRecord,
        output="chaos",
        num_images=1000,
        num_runs=20,
        ends=dict.fromkeys(re.findall(r"\d ([a-z ]+)", ends), 5),
        num_kills={"worker": 10, "driver": 5},
        kills_by_moment=counts(kills.partition(":")[2]),
        num_overlaps=5,
        compactions=counts(compacted),
        most_under_way=100,
        num_opened_again=100,
        num_polls=100,
        num_torn=0,
        num_twice=0,
        num_shrunk=0,
        num_missing=0,
        num_extra=0,
        duration_s=9.0,
        config={"executor": "inline"},
    )
    check_printed(shown, record)


def test_bench_plan_prints_what_the_readme_shows() -> None:
    (line,) = (line for line in commands(README) if line.startswith("catdog bench plan"))
    shown = printed(line)
    measured = {"seconds": 1.5, "peak_bytes": 2.0**28, "num_parts": 2.0, "listed": 1000.0}
    objects = [10_000 * 10**power for power in range(len(shown) - 4)]
    record: BenchPlanRecord = made(
        BenchPlanRecord,
        output="plan",
        layout="deep",
        page_ms=50,
        one_list=measured,
        many_lists=measured,
        objects=objects,
        all_new=[measured] * len(objects),
        indexing=[measured] * len(objects),
        mostly_done=[measured] * len(objects),
    )
    shown, expected = ([" ".join(line.split()) for line in lines] for lines in (shown, record.summary()))
    assert shape(shown) == shape(expected), "README shows other lines than the command prints"


def test_compact_prints_what_the_readme_shows() -> None:
    shown = printed("catdog compact predictions")
    record: CompactRecord = made(
        CompactRecord,
        output="predictions",
        num_merged=2,
        num_parts_before=2,
        num_parts_after=1,
        num_rows=9,
        left={},
        num_deleted=0,
        num_finished=0,
        duration_s=9.0,
    )
    check_printed(shown, record)


def test_compare_prints_what_the_readme_shows() -> None:
    shown = printed("catdog compare predictions predictions-float --output compare.html")
    names = [line.split()[1].rstrip(":") for line in shown if line.startswith("  flip  ")]
    flips = [
        Difference(
            uri=name,
            before=before,
            after=after,
            prob_dog_before=0.4,
            prob_dog_after=0.6,
            error_code=None,
            error_message=None,
        )
        for name, before, after in zip(names, ("cat", "dog"), ("dog", "cat"), strict=True)
    ]
    record: Comparison = made(
        Comparison,
        before="predictions",
        after="predictions-float",
        model_before="722696aec7bd",
        model_after="722696aec7bd",
        both=500,
        flows={"cat": {"dog": 1}, "dog": {"cat": 1}},
        flips=2,
        new_errors=0,
        mended=0,
        shifted=5,
        shift_quantiles={"50 %": 0.000129, "90 %": 0.0159, "99 %": 0.0982, "100 %": 0.167},
        review_added=3,
        review_dropped=2,
        content_changed=0,
        only_before=0,
        only_after=0,
        examples={"flips": flips, "new_errors": []},
        page="compare.html",
    )
    check_printed(shown, record)


def test_bench_serve_prints_what_the_readme_shows() -> None:
    shown = printed("catdog bench serve --images originals.zip --output bench")
    load = Load(images_per_s=1.0, p50_ms=1.0, p99_ms=1.0, num_answers=1, num_errors=0)
    record: BenchServeRecord = made(
        BenchServeRecord,
        output="bench",
        num_images=63,
        ratios=dict.fromkeys(map(str, NUM_CLIENTS), spread([1.0])),
        alone_ms={"decode": spread([1.0]), "forward": spread([1.0])},
        overhead_ms=spread([1.0]),
        agreement=1.0,
        rounds=[{name: dict.fromkeys(map(str, NUM_CLIENTS), load) for name in CONTENDERS}] * 3,
        host={"cpu": "x", "num_cores": 2, "system": "x"},
        duration_s=9.0,
    )
    assert [" ".join(line.split()) for line in shape(shown)] == [
        " ".join(line.split()) for line in shape(record.summary())
    ]


def test_the_books_that_the_readme_shows_close() -> None:
    lines = [line for line in console_lines(README) if line.startswith("  books ")]
    assert len(lines) >= 3
    for line in lines:
        listed, *others = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line))
        assert listed == sum(others), line


# Examples.


NEED_A_MODEL = {"catdog.bundle", "catdog.engines", "catdog.evaluation", "catdog.inference", "catdog.labelling"}
"""Modules whose examples load a model, and TensorFlow with it."""


def modules_with_examples() -> set[str]:
    found = [path for path in files() if ">>> " in path.read_text()]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in found]
    return {name.removesuffix(".__init__") for name in names}


def run_examples(names: set[str]) -> None:
    for name in sorted(names):
        failed, num_examples = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert num_examples, f"{name} has a >>> outside of docstrings, where nothing runs it"
        assert not failed, f"{failed} of {num_examples} examples of {name} fail: see the output"


def test_the_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(modules_with_examples() - NEED_A_MODEL)


@pytest.mark.slow
def test_the_examples_that_load_a_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(modules_with_examples() & NEED_A_MODEL)


def test_what_runs_a_command_says_what_it_does() -> None:
    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(command.module)
        assert inspect.getdoc(getattr(module, command.function)), f"the function of `catdog {name}` has no docstring"
