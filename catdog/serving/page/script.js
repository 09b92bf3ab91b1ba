// The page of `catdog serve`: pictures come in, wait in a queue, and get a card each. One request labels one picture, so
// that results appear one by one. A request that the service cannot take now waits and is sent again.

const NUM_AT_ONCE = 4;
const NUM_SILENCES = 5; // in a row, after which the service counts as gone
const NUM_CARDS_AT_ONCE = 50; // between two looks at what the user does
const SUMMARY_MS = 1000; // between two texts that a screen reader reads out

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** Error code → what it means for the user. The service's own words stand below it. */
const IN_WORDS = {
  empty_file: "The file is empty",
  unsupported_format: "Not a picture that catdog can read",
  truncated: "The file ends in the middle of the picture",
  too_large: "The picture is too large",
  decode_failed: "The picture is damaged",
  decoder_died: "The picture could not be read",
  not_found: "The file is gone",
  unauthorized: "The service needs a token",
  unreachable: "The service does not answer",
  draining: "The service is about to end",
  internal_error: "The service has failed",
  timeout: "The picture was sent too slowly",
};

/** Why a person should look, in words. */
const REVIEW_IN_WORDS = {
  damaged: "Part of the picture is missing: a person should look",
  neither: "Perhaps neither a cat nor a dog: a person should look",
  unsure: "Not sure: a person should look",
};

/** Codes that would meet every picture, for now. */
const CLOSED = new Set(["unauthorized", "unreachable", "draining"]);

/** Codes that say nothing of the picture: it may be sent again. */
const PASSING = new Set([...CLOSED, "internal_error", "timeout"]);

/** A request that got no answer: one of the service's, or one that never came to it. */
class Problem extends Error {
  constructor(code, detail) {
    super(detail);
    this.code = code;
  }
}

// What the page holds.

let items = []; // in the order in which they came
let waiting = []; // those that no request is under way for
let numRunning = 0;
let ended = new AbortController(); // aborts at "Clear"
let model = null; // what GET v1/model says
let token = sessionStorage.getItem("catdog-token");

const runId = newRunId();

function newRunId() {
  const random = crypto.getRandomValues(new Uint8Array(4));
  const hex = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return `${new Date().toISOString().replaceAll(/[-:]/g, "").replace("Z", "000Z")}-${hex}`;
}

// Requests.

let pausedUntil = 0;
let numSilent = 0;

/** Ask the service, as often as it takes. Throws a Problem, or an AbortError once `signal` aborts. */
async function ask(path, signal, file = null) {
  for (;;) {
    await pauseIsOver(signal);
    const used = token;
    const response = await fetch(path, requestOf(file, used, signal)).catch((error) => error);
    signal?.throwIfAborted();
    if (!(response instanceof Response)) {
      await noteSilence(file);
      continue;
    }
    if (response.status !== 503) numSilent = 0;
    if (response.ok) {
      if (performance.now() >= pausedUntil) $("notice").textContent = "";
      return response;
    }
    const problem = await problemOf(response);
    if (response.status === 401) await anotherToken(used);
    else if (response.status === 429) pause(response, "The service is busy");
    else if (response.status === 503 && ++numSilent < NUM_SILENCES) pause(response, "The service is about to end");
    else throw problem;
  }
}

function requestOf(file, used, signal) {
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (file === null) return { headers, signal };
  headers["Content-Type"] = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  return { method: "POST", body: file, headers, signal };
}

async function problemOf(response) {
  const found = await response.json().catch(() => ({}));
  return new Problem(found.code ?? `http_${response.status}`, found.detail ?? found.title ?? response.statusText);
}

/** No answer came: either the file cannot be read any more, or the service is gone, for a while or for good. */
async function noteSilence(file) {
  try {
    await file?.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem("not_found", "it was moved, deleted or changed after you chose it");
  }
  numSilent += 1;
  if (numSilent >= NUM_SILENCES) throw new Problem("unreachable", "perhaps it has ended, or your network is down");
  pauseFor(numSilent, "The service does not answer");
}

function pause(response, reason) {
  pauseFor(Number(response.headers.get("Retry-After")) || 1, reason);
}

function pauseFor(seconds, reason) {
  pausedUntil = Math.max(pausedUntil, performance.now() + 1000 * seconds);
  $("notice").textContent = `${reason}; trying again in ${plural(seconds, "second")}.`;
}

async function pauseIsOver(signal) {
  while (pausedUntil > performance.now()) {
    await sleep(pausedUntil - performance.now());
    signal?.throwIfAborted();
  }
}

// The token.

let asking = null;

/** Wait for a token other than the one that was refused. Several requests may wait; the user is asked once. */
async function anotherToken(refused) {
  if (token !== refused) return;
  asking ??= askForToken(refused).finally(() => (asking = null));
  token = await asking;
  sessionStorage.setItem("catdog-token", token);
}

function askForToken(refused) {
  const dialog = $("token-dialog");
  $("token-error").textContent = refused ? "The service does not accept this token." : "";
  $("token").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  $("token").focus();
  return new Promise((resolve, reject) => {
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.returnValue === "use") resolve($("token").value);
        else reject(new Problem("unauthorized", "ask whoever runs the service, then try again"));
      },
      { once: true },
    );
  });
}

// The queue.

/** Take pictures in: [{file, name, problem}], where a problem says why the file cannot be read. */
async function add(found) {
  const { signal } = ended;
  if (!found.length) {
    $("notice").textContent = "There is no file in what you dropped or pasted.";
    return;
  }
  $("notice").textContent = "";
  const isFirst = items.length === 0;
  for (let start = 0; start < found.length && !signal.aborted; start += NUM_CARDS_AT_ONCE) {
    const fresh = found.slice(start, start + NUM_CARDS_AT_ONCE).map(newItem);
    items.push(...fresh);
    waiting.push(...fresh);
    $("cards").append(...fresh.map((item) => item.card));
    if (start === 0 && !isFirst) fresh[0].card.scrollIntoView({ block: "nearest" });
    showSummary();
    pump();
    await sleep(0);
  }
}

function newItem({ file, name, problem = null }) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const item = { file, name, problem, card, state: "waiting", row: null, overlay: null, isExplained: false };
  card.querySelector(".name").textContent = name;
  card.querySelector(".name").title = name;
  card.querySelector(".placeholder").textContent = kindOf(name);
  card.querySelector(".why button").addEventListener("click", () => toggleWhy(item));
  itemOf.set(card, item);
  inSight.observe(card);
  show(item);
  return item;
}

const kindOf = (name) => (/\.(\w{1,5})$/.exec(name)?.[1] ?? "file").toUpperCase();

function pump() {
  while (numRunning < NUM_AT_ONCE && waiting.length) {
    numRunning += 1;
    label(waiting.shift(), ended.signal);
  }
}

async function label(item, signal) {
  setState(item, "running");
  try {
    if (item.problem) throw item.problem;
    checkSize(item.file);
    const { model_id, predictions } = await (await ask("v1/predict", signal, item.file)).json();
    signal.throwIfAborted();
    if (model_id !== model?.model_id) showModel();
    item.row = { ...predictions[0], model_id };
  } catch (error) {
    if (signal.aborted) return; // "Clear" has emptied the queue, and counts anew
    item.row = await rowOf(error, item.file);
    if (CLOSED.has(error.code)) giveUp(item.row);
  }
  item.row.predicted_at = new Date().toISOString();
  setState(item, item.row.status);
  numRunning -= 1;
  pump();
}

/** A file over the limit would be refused, too, but in the middle of its upload. */
function checkSize(file) {
  const limit = model?.limits?.max_bytes;
  if (limit && file.size > limit) {
    throw new Problem("too_large", `${megabytes(file.size)}, and at most ${megabytes(limit)} are allowed`);
  }
}

const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

async function rowOf(error, file) {
  const problem = error instanceof Problem ? error : new Problem("internal_error", String(error));
  return {
    status: "error",
    error_code: problem.code,
    error_message: problem.message,
    num_bytes: file.size,
    image_id: problem.code in IN_WORDS && !PASSING.has(problem.code) ? await hashOf(file) : null,
  };
}

/** SHA-256, which the service tells only of pictures with a label. Browsers compute it where the page is secure. */
async function hashOf(file) {
  if (!crypto.subtle || file.size === 0 || file.size > (model?.limits?.max_bytes ?? 0)) return null;
  try {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  } catch {
    return null; // the file is gone, which its error says
  }
}

/** What waits would fare no better than the one that got this row. */
function giveUp(row) {
  for (const item of waiting.splice(0)) {
    item.row = { ...row, num_bytes: item.file.size, predicted_at: new Date().toISOString() };
    setState(item, "error");
  }
  $("notice").textContent = "";
}

const mayTryAgain = (item) => item.state === "error" && PASSING.has(item.row.error_code);

$("again").addEventListener("click", () => {
  numSilent = 0;
  for (const item of items.filter(mayTryAgain)) {
    waiting.push(item);
    setState(item, "waiting");
  }
  $("choose").focus(); // this button goes away
  pump();
});

$("clear").addEventListener("click", () => {
  ended.abort();
  ended = new AbortController();
  inSight.disconnect();
  items = [];
  waiting = [];
  numRunning = 0;
  $("cards").replaceChildren();
  $("notice").textContent = "";
  showSummary();
  $("choose").focus();
});

// What the user sees.

const itemOf = new WeakMap();

/** Thumbnails are there while their cards are about to be seen: a thousand photographs would not fit in memory. */
const inSight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) showPictures(itemOf.get(target));
      else target.querySelectorAll(".picture img").forEach((image) => image.remove());
    }
  },
  { rootMargin: "600px" },
);

function showPictures(item) {
  const frame = item.card.querySelector(".picture");
  if (!frame.querySelector(".thumbnail")) showThumbnail(item, frame);
  if (item.isExplained && !frame.querySelector(".overlay")) showOverlay(item, frame);
}

function showThumbnail(item, frame) {
  const image = imageOf(item.file, "thumbnail", () => {
    const isBomb = image.naturalWidth * image.naturalHeight > (model?.limits?.max_pixels ?? 1e8);
    if (isBomb || frame.querySelector(".thumbnail")) return;
    frame.querySelector(".placeholder").after(image);
  });
  image.alt = ""; // the name stands below
}

function showOverlay(item, frame) {
  const { width, height } = item.row;
  const image = imageOf(item.overlay, "overlay", () => {});
  image.alt = `${item.name}: what glows speaks for “${item.row.label}”`;
  image.style.aspectRatio = `${width} / ${height}`;
  image.classList.add(width * 3 >= height * 4 ? "wide" : "tall");
  frame.append(image);
}

/** An image that is not in the page yet, so that the browser draws it no earlier than `onload` allows. */
function imageOf(blob, className, onload) {
  const image = new Image();
  const url = URL.createObjectURL(blob);
  image.className = className;
  image.decoding = "async";
  image.onload = () => {
    URL.revokeObjectURL(url);
    onload();
  };
  image.onerror = () => URL.revokeObjectURL(url); // the placeholder stays
  image.src = url;
  return image;
}

function setState(item, state) {
  item.state = state;
  show(item);
  showSummary();
}

function show(item) {
  const { card, state, row } = item;
  card.dataset.state = state;
  card.dataset.label = (state === "ok" && row.label) || "";
  const part = (name) => card.querySelector(name);
  part(".verdict").replaceChildren(...verdictOf(item));
  setText(part(".review"), state === "ok" && row.needs_review ? [REVIEW_IN_WORDS[row.review_reason]] : []);
  part(".scale").hidden = part(".why").hidden = state !== "ok";
  if (state === "ok") part(".mark").style.left = `${100 * row.prob_dog}%`;
  setText(part(".detail"), state === "error" ? detailOf(row) : []);
  setText(part(".remark"), state === "ok" && row.remark ? [`Note: ${row.remark}`] : []);
  setText(part(".read"), state === "ok" && row.read_as ? [unbroken(`${row.format ?? "Read as"}, ${row.read_as}`)] : []);
}

function verdictOf({ state, row }) {
  if (state === "waiting") return ["Waiting"];
  if (state === "running") return ["Looking …"];
  if (state === "error") return [IN_WORDS[row.error_code] ?? "No label"];
  const confidence = document.createElement("span");
  confidence.className = "confidence";
  confidence.textContent = percent(row.confidence);
  const word = row.label === "dog" ? "Dog" : "Cat";
  return [row.needs_review ? `${word}?` : word, " ", confidence];
}

/** With sizes that no line break divides. */
const unbroken = (text) => text.replaceAll(" × ", "\u00a0×\u00a0");

/** Never 100 %, which no model may say. */
const percent = (probability) => (probability >= 0.9995 ? "over 99.9 %" : `${(100 * probability).toFixed(1)} %`);

function detailOf(row) {
  const code = document.createElement("code");
  code.textContent = row.error_code;
  return row.error_message ? [`${row.error_message} (`, code, ")"] : [code];
}

function setText(element, parts) {
  element.replaceChildren(...parts);
  element.hidden = parts.length === 0;
}

// The summary.

let summaryTimer = null;

/** Show how far it is. The text changes once a second, so that a screen reader can follow; the last one always comes. */
function showSummary() {
  const counts = countsOf(items);
  const isComplete = counts.waiting === 0;
  $("results").hidden = items.length === 0;
  document.body.classList.toggle("has-results", items.length > 0);
  $("results").classList.toggle("is-complete", isComplete);
  $("progress").max = items.length || 1;
  $("progress").value = items.length - counts.waiting;
  $("download").disabled = !isComplete || items.length === 0;
  $("again").hidden = !isComplete || counts.passing === 0;
  $("again").textContent = `Try ${plural(counts.passing, "picture")} again`;
  summaryTimer ??= setTimeout(
    () => {
      summaryTimer = null;
      $("summary").textContent = summaryOf(countsOf(items));
    },
    isComplete || !$("summary").textContent ? 0 : SUMMARY_MS,
  );
}

function countsOf(all) {
  const counts = { cat: 0, dog: 0, unsure: 0, error: 0, waiting: 0, passing: 0 };
  for (const item of all) {
    if (item.state === "ok") {
      counts[item.row.label] += 1;
      if (item.row.needs_review) counts.unsure += 1;
    } else counts[item.state === "error" ? "error" : "waiting"] += 1;
    if (mayTryAgain(item)) counts.passing += 1;
  }
  return counts;
}

function summaryOf(counts) {
  if (!items.length) return "";
  const parts = [plural(counts.cat, "cat"), plural(counts.dog, "dog")];
  if (counts.unsure) parts.push(`${counts.unsure.toLocaleString("en")} of them unsure`);
  if (counts.error) parts.push(plural(counts.error, "error"));
  if (counts.waiting) parts.push(`${counts.waiting.toLocaleString("en")} to go`);
  return parts.join(", ");
}

// Why.

async function toggleWhy(item) {
  const { signal } = ended;
  const button = item.card.querySelector(".why button");
  const method = item.card.querySelector(".method");
  if (button.getAttribute("aria-disabled") === "true") return; // the service is being asked
  try {
    if (item.overlay === null) {
      button.setAttribute("aria-disabled", "true");
      method.textContent = "Looking …";
      const response = await ask("v1/explain", signal, item.file);
      item.method = response.headers.get("X-Saliency-Method");
      item.overlay = await response.blob();
    }
    setExplained(item, !item.isExplained);
  } catch (error) {
    if (!signal.aborted) method.textContent = `No answer: ${error.message} (${error.code ?? "internal_error"})`;
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

function setExplained(item, isExplained) {
  item.isExplained = isExplained;
  item.card.querySelector(".why button").setAttribute("aria-pressed", String(isExplained));
  item.card.querySelector(".method").textContent = isExplained ? whatOverlayShows(item) : "";
  item.card.querySelector(".overlay")?.remove();
  if (isExplained) showOverlay(item, item.card.querySelector(".picture"));
}

const whatOverlayShows = ({ row, method }) => `What glows speaks for “${row.label}”${method ? ` (${method})` : ""}`;

// The results as a file.

/** The columns of the bulk job, in its order. */
const COLUMNS = [
  "uri", "image_id", "source_version", "label", "prob_dog", "confidence", "needs_review", "review_reason", "status",
  "error_code", "error_message", "remark", "width", "height", "num_bytes", "model_id", "run_id", "predicted_at",
];

function csv() {
  const rows = items.map(({ file, name, row }) => ({
    ...row,
    uri: name,
    source_version: `${file.size}-${file.lastModified}000000`,
    model_id: row.model_id ?? model?.model_id,
    run_id: runId,
  }));
  return [COLUMNS, ...rows.map((row) => COLUMNS.map((column) => row[column]))]
    .map((cells) => `${cells.map(cell).join(",")}\r\n`)
    .join("");
}

/** A cell, quoted where it must be. A spreadsheet takes a text that begins with one of these signs for a formula. */
function cell(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^\s*[=+\-@\t\r\n＝＋－＠]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n']/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

$("download").addEventListener("click", () => {
  const link = document.createElement("a");
  const url = URL.createObjectURL(new Blob(["\ufeff", csv()], { type: "text/csv;charset=utf-8" })); // BOM: for Excel
  link.href = url;
  link.download = `catdog-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});

// Ways in.

const named = (files) => Array.from(files, (file) => ({ file, name: file.name || "unnamed" }));

for (const id of ["choose", "photograph"]) {
  $(id).addEventListener("change", ({ target }) => {
    add(named(target.files));
    target.value = ""; // the same file may be chosen again
  });
}

document.addEventListener("paste", ({ clipboardData, target }) => {
  if (target instanceof HTMLInputElement && target.type === "password") return;
  add(named(clipboardData.files));
});

let depth = 0; // of the elements that are dragged over

document.addEventListener("dragenter", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  depth += 1;
  $("veil").hidden = false;
});

document.addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  $("veil").hidden = depth === 0;
});

document.addEventListener("dragover", (event) => event.preventDefault());

document.addEventListener("drop", async (event) => {
  event.preventDefault();
  depth = 0;
  $("veil").hidden = true;
  const entries = Array.from(event.dataTransfer.items, (each) => each.webkitGetAsEntry?.());
  if (!entries.some((entry) => entry?.isDirectory)) {
    add(named(event.dataTransfer.files));
    return;
  }
  const { signal } = ended;
  for (const entry of entries) {
    if (entry) for await (const some of filesOf(entry)) if (!signal.aborted) await add(some);
  }
});

/** A file, or all that lie below a folder, but not those whose names begin with a dot, as in the bulk job. */
async function* filesOf(entry) {
  const name = entry.fullPath.slice(1);
  try {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      yield [{ file, name }];
      return;
    }
    const reader = entry.createReader();
    let some;
    do {
      some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // some of them at a time
      const files = [];
      for (const each of some.filter((each) => !each.name.startsWith("."))) {
        for await (const found of filesOf(each)) files.push(...found);
      }
      if (files.length) yield files;
    } while (some.length);
  } catch (error) {
    const problem = new Problem("not_found", `it cannot be read: ${error.message}`);
    yield [{ file: new File([], name), name, problem }];
  }
}

// The model.

let modelUnderWay = null;

function showModel() {
  modelUnderWay ??= fetchModel().finally(() => (modelUnderWay = null));
}

async function fetchModel() {
  try {
    model = await (await ask("v1/model")).json();
    const { architecture, input_size, engine, model_id, limits } = model;
    $("model").textContent =
      `Model ${model_id.slice(0, 12)}: ${architecture ?? "unknown architecture"} ` +
      `at ${unbroken(`${input_size} × ${input_size}`)}, ${engine}. A picture may have ` +
      `${megabytes(limits.max_bytes)} and ${Math.floor(limits.max_pixels / 1e6)} megapixels.`;
  } catch (error) {
    $("model").textContent = `No model: ${IN_WORDS[error.code] ?? error.message}.`;
    $("notice").textContent = "";
  }
}

showModel();
