"""What a command prints when it is done: its run record in a few lines for people."""

from typing import Any

Record = dict[str, Any]

_STAGES = {
    "compute_s": "computing",
    "input_s": "waiting for images",
    "validation_s": "validating",
    "checkpoint_s": "saving",
}


def prepare(record: Record) -> list[str]:
    """Kept and rejected, per split and class."""
    if record["already_done"]:
        head = f"Nothing to do: the dataset is there, {record['kept']:,} of {record['listed']:,} files."
    else:
        seconds = sum(record["durations_s"].values())
        head = f"Prepared {record['kept']:,} of {record['listed']:,} files in {_rate(seconds, record['images_per_s'])}."
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in record["reasons"].items())
    return [
        head,
        *(f"  {split:<9}" + ", ".join(_counted(counts)) for split, counts in record["counts"].items()),
        f"  rejected {record['rejected']:,}" + (f": {reasons}" if reasons else ""),
        f"  groups   {record['num_duplicate_groups']:,} of duplicates, {record['num_conflicts']:,} labelled both ways",
        f"Dataset: {record['output']}",
    ]


def train(record: Record) -> list[str]:
    """The last epoch's figures, what calibration changed, and where the time went."""
    last = record["metrics"]
    errors = record["calibration"]["expected_calibration_error"]
    before, after = errors["before"]["value"], errors["after"]["value"]
    durations = {name: record["durations_s"][name] for name in _STAGES}
    total = max(sum(durations.values()), 1e-9)
    return [
        f"Trained {record['arch']} for {record['epochs_trained']} epochs in {record['training_seconds']:,.0f} s "
        f"({record['precision']}).",
        f"  training    accuracy {_percent(last['train_accuracy'])}, loss {last['train_loss']:.4f}",
        f"  validation  accuracy {_percent(last['val_accuracy'])}, loss {last['val_loss']:.4f}",
        f"  calibration temperature {record['calibration']['temperature']:.2f}: "
        f"ECE {before:.4f}, cross-fitted {after:.4f}",
        "  time        "
        + ", ".join(f"{_percent(seconds / total)} {_STAGES[name]}" for name, seconds in durations.items()),
        f"Model: {record['output']}",
    ]


def evaluate(record: Record) -> list[str]:
    """The metrics with their 95 % confidence intervals, and the confusion matrix."""
    (cats_right, cats_wrong), (dogs_wrong, dogs_right) = record["confusion_matrix"]
    return [
        f"Evaluated {record['num_images']:,} {record['split']} images in {record['duration_s']:,.1f} s.",
        f"  accuracy   {_metric(record['accuracy'], percent=True)}",
        f"  log loss   {_metric(record['log_loss'])}",
        f"  ECE        {_metric(record['expected_calibration_error'])}",
        f"  ROC AUC    {_metric(record['roc_auc'])}",
        f"  cats       {cats_right:,} right, {cats_wrong:,} taken for dogs",
        f"  dogs       {dogs_right:,} right, {dogs_wrong:,} taken for cats",
        f"Evaluation: {record['output']}",
    ]


def predict(record: Record) -> list[str]:
    """What was labelled, and the books."""
    books = record["books"]
    num_labelled = books["ok"] + books["error"]
    if num_labelled:
        took = _rate(record["durations_s"]["total"], record["images_per_s"])
        head = f"Labelled {num_labelled:,} images in {took} ({record['executor']})."
    else:
        head = "Nothing to label: everything listed is labelled already."
    errors = ", ".join(f"{count:,} {code}" for code, count in record["errors"].items())
    return [
        head,
        "  labels   " + ", ".join(_counted(record["labels"])) + f"; {record['needs_review']:,} need review",
        *([f"  errors   {errors}"] if errors else []),
        f"  books    {books['listed']:,} listed = {books['ok']:,} ok + {books['error']:,} error "
        f"+ {books['already_done']:,} already done + {books['duplicate']:,} duplicate",
        f"Predictions: {record['output']} (run {record['run_id']})",
    ]


def demo(record: Record) -> list[str]:
    """Every job's lines, and where everything is."""
    return [
        *prepare(record["prepare"]),
        *train(record["train"]),
        *predict(record["predict"]),
        *evaluate(record["evaluate"]),
        f"The demo took {record['duration_s']:,.0f} s. Look at:",
        f"  {record['drawings']}",
        f"  {record['prepare']['output']}/samples.png",
        f"  {record['train']['output']}/curves.png",
        *(f"  {path}" for name, path in record["evaluate"]["files"].items() if name.endswith(".png")),
    ]


def bench_train(record: Record) -> list[str]:
    """Every figure with its range over the rounds and its target."""
    config, workers = record["config"], _workers(record["num_workers"])
    figures = {name: _figure(figure) for name, figure in record["figures"].items()}
    goals = {name: f"{100 * figure['target']:g} %" for name, figure in record["figures"].items()}
    return [
        f"Trained {record['arch']} at {record['image_size']} px on {record['num_images']:,} images, "
        f"{config['num_rounds']} times with every contender, in {record['duration_s']:,.0f} s.",
        "Images per second:",
        f"  Keras tutorial  {figures['tutorial_speedup']} of its (goal: at least {goals['tutorial_speedup']})",
        f"    both decoding {figures['tutorial_speedup_streamed']} of its "
        f"(goal: at least {goals['tutorial_speedup_streamed']})",
        f"  bare processes  {figures['ray_efficiency']} of theirs (goal: at least {goals['ray_efficiency']})",
        f"  one worker      {figures['scaling_efficiency']} of its with each of {workers} "
        f"(goal: at least {goals['scaling_efficiency']})",
        f"  side by side    {figures['sharing_efficiency']} of those of {workers} that share nothing "
        f"(goal: at least {goals['sharing_efficiency']})",
        "Share of the time in which workers wait for images:",
        f"  in memory       {figures['input_share_in_memory']} (goal: below {goals['input_share_in_memory']})",
        f"  streamed        {figures['input_share_streamed']} (goal: below {goals['input_share_streamed']})",
        f"Bench: {record['output']}",
    ]


def bench_chaos(record: Record) -> list[str]:
    """Both trainings side by side."""
    calm, chaos = record["undisturbed"], record["disturbed"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in record["kills_by_moment"].items())
    return [
        f"Killed {_workers(record['num_kills'])} of a training of {record['num_steps']:,} steps: {kinds}.",
        f"  restarts    {record['num_restarts']:,}; {record['num_lost_steps']:,} steps done again, "
        f"at most {record['most_lost_steps']:,} at once, with {record['config']['checkpoint_steps']:,} "
        "between checkpoints",
        f"  weights     differ by at most {record['max_weight_difference']:g}",
        f"  validation  accuracy {_percent(chaos['val_accuracy'])}, loss {chaos['val_loss']:.6f}; "
        f"undisturbed {_percent(calm['val_accuracy'])}, {calm['val_loss']:.6f}",
        f"  time        {chaos['wall_seconds']:,.0f} s; undisturbed {calm['wall_seconds']:,.0f} s",
        f"Chaos: {record['output']}",
    ]


def _workers(num: int) -> str:
    return f"{num:,} worker{'s' * (num != 1)}"


def _figure(figure: Record) -> str:
    return f"{100 * figure['median']:.1f} % ({100 * figure['min']:.1f} to {100 * figure['max']:.1f})"


def _rate(seconds: float, images_per_s: float) -> str:
    return f"{seconds:,.1f} s, {images_per_s:,.0f} images/s"


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{count:,} {name}" for name, count in counts.items()]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _metric(metric: Record, *, percent: bool = False) -> str:
    """A value with its 95 % confidence interval."""
    if metric["value"] is None:
        return f"undefined: {metric['reason']}"
    low, high = metric["ci95"]
    if percent:
        return f"{_percent(metric['value'])} (95 % interval {100 * low:.2f} to {100 * high:.2f})"
    return f"{metric['value']:.4f} (95 % interval {low:.4f} to {high:.4f})"
