"""What a command prints when it is done: its run record in a few lines for people."""

from typing import Any

Record = dict[str, Any]


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
    """The best epoch's figures."""
    best = record["metrics"]
    return [
        f"Trained {record['arch']} for {record['epochs_trained']} epochs in {record['training_seconds']:,.0f} s "
        f"({record['precision']}); best is epoch {record['best_epoch']}.",
        f"  training    accuracy {_percent(best['train_accuracy'])}, loss {best['train_loss']:.4f}",
        f"  validation  accuracy {_percent(best['val_accuracy'])}, loss {best['val_loss']:.4f}",
        f"Model: {record['output']}",
    ]


def evaluate(record: Record) -> list[str]:
    """The metrics with their 95 % confidence intervals, and the confusion matrix."""
    (cats_right, cats_wrong), (dogs_wrong, dogs_right) = record["confusion_matrix"]
    return [
        f"Evaluated {record['num_images']:,} {record['split']} images in {record['duration_s']:,.1f} s.",
        f"  accuracy   {_metric(record['accuracy'], percent=True)}",
        f"  log loss   {_metric(record['log_loss'])}",
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
