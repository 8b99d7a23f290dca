// The page of `perception-rt serve`. It speaks to the server's own routes and to nothing else.

const $ = (id) => document.getElementById(id);
const KEY = "perception_rt.key";
const BOX = /\[\s*(\d{3})\s*,\s*(\d{3})\s*,\s*(\d{3})\s*,\s*(\d{3})\s*\]/g;

let media = []; // {file, kind, url, frame} of the images and videos shown
let key = sessionStorage.getItem(KEY) ?? "";

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Requests

/** Sends a request; asks for an API key as often as the server wants another one. */
async function call(path, body, signal) {
  for (;;) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = { headers, signal };
    if (body) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reason(response));
    await askForKey(key !== "");
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

let asking = null; // one dialog, whoever waits for it

function askForKey(wrong) {
  asking ??= new Promise((resolve, reject) => {
    let given = false;
    if (wrong) $("key-note").textContent = "The server does not accept this key.";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey($("key").value.trim());
      given = true;
      $("key").value = "";
      $("key-dialog").close();
    };
    $("key-dialog").onclose = () => {
      asking = null;
      $("key-button").hidden = false;
      if (given) resolve();
      else reject(new Error("This server needs an API key."));
    };
    $("key-dialog").showModal();
  });
  return asking;
}

function setKey(value) {
  key = value;
  sessionStorage.setItem(KEY, key);
}

/** Data of server-sent events, each of which ends with an empty line. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name}: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

// Images and videos

function add(files) {
  showError("");
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") {
      showError(`${file.name} is neither an image nor a video`);
      continue;
    }
    const url = URL.createObjectURL(file);
    const view = kind === "image" ? make("img", { alt: file.name }) : make("video");
    Object.assign(view, { src: url, controls: true, muted: true });
    const item = { file, kind, url, frame: make("div", { className: "frame" }, view) };
    const remove = make("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const caption = make("figcaption", { className: "note" }, make("span", {}, file.name), remove);
    const row = make("li", {}, make("figure", {}, item.frame, caption));
    remove.onclick = () => drop(item, row);
    media.push(item);
    $("shown").append(row);
  }
  drawBoxes("");
  $("clear").hidden = media.length < 2;
}

function drop(item, row) {
  URL.revokeObjectURL(item.url);
  row.remove();
  media = media.filter((other) => other !== item);
  drawBoxes("");
  $("clear").hidden = media.length < 2;
  $("files").focus();
}

/** Images as data URLs; an error if there are none, or if one is a video. */
async function images(most = Infinity) {
  const found = media.filter((item) => item.kind === "image");
  if (!found.length) throw new Error("Choose an image first.");
  if (found.length > most) throw new Error("Choose one image only.");
  return Promise.all(found.map((item) => dataUrl(item.file)));
}

/** Draws the boxes of an answer; with several images, it does not say which one they are in. */
function drawBoxes(answer) {
  for (const old of document.querySelectorAll(".box")) old.remove();
  if (media.length !== 1 || media[0].kind !== "image") return;
  let number = 0;
  for (const match of answer.matchAll(BOX)) {
    const [x1, y1, x2, y2] = match.slice(1).map(Number);
    if (x2 < x1 || y2 < y1) continue;
    const label = make("span", {}, String(++number));
    const box = make("div", { className: "box", title: match[0] }, label);
    box.style.left = `${x1 / 10}%`;
    box.style.top = `${y1 / 10}%`;
    box.style.width = `${(x2 - x1) / 10}%`;
    box.style.height = `${(y2 - y1) / 10}%`;
    media[0].frame.append(box);
  }
}

// Tasks

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

async function ask(form, signal) {
  const asked = [...media];
  const content = await Promise.all(
    asked.map(async ({ file, kind }) => ({
      type: `${kind}_url`,
      [`${kind}_url`]: { url: await dataUrl(file) },
    })),
  );
  content.push({ type: "text", text: form.question.value.trim() });
  $("answer").textContent = $("usage").textContent = "";
  drawBoxes("");
  const body = {
    model: form.model.value,
    messages: [{ role: "user", content }],
    max_tokens: form.most.valueAsNumber,
    temperature: form.temperature.valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await call("v1/chat/completions", body, signal);
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Error(error.message);
    const choice = choices[0];
    if (choice?.delta.content) $("answer").append(choice.delta.content);
    if (choice?.finish_reason === "length") $("usage").textContent = "Cut off. ";
    if (usage) {
      const { prompt_tokens, completion_tokens } = usage;
      $("usage").append(`Tokens: ${prompt_tokens} read, ${completion_tokens} written`);
    }
    const same = asked.length === media.length && asked.every((item, i) => item === media[i]);
    if (same) drawBoxes($("answer").textContent);
  }
}

async function classify(form, signal) {
  const shown = media.filter((item) => item.kind === "image");
  const labels = lines(form.labels.value);
  const body = { model: form.model.value, images: await images(), labels };
  const templates = lines(form.templates.value);
  if (templates.length) body.templates = templates;
  const answer = await (await call("v1/classify", body, signal)).json();
  $("bars").replaceChildren();
  for (const { index, probabilities } of answer.data) {
    const rows = answer.labels.map((label, i) => [label, probabilities[i]]);
    rows.sort((a, b) => b[1] - a[1]);
    $("bars").append(make("h3", {}, shown[index].file.name), ...rows.map(bar));
  }
}

function bar([label, value]) {
  const progress = make("progress", { max: 1, value });
  progress.setAttribute("aria-label", label);
  const percent = make("span", {}, `${(100 * value).toFixed(1)}%`);
  return make("div", { className: "bar" }, make("span", {}, label), progress, percent);
}

async function features(form, signal) {
  const [image] = await images(1);
  const body = { model: form.model.value, image, layer: form.layer.valueAsNumber };
  const answer = await (await call("v1/features", body, signal)).json();
  const alt = "The three largest principal components of the features as red, green and blue";
  const note = `${answer.shape.join(" x ")} features. ${alt}.`;
  $("picture").replaceChildren(
    make("img", { src: answer.picture, alt }),
    make("p", { className: "note" }, note),
  );
}

/** Runs a task when its form is sent; one at a time. */
function connect(id, task) {
  const form = $(id);
  const button = form.querySelector("button.main");
  const stop = form.elements.stop;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    const abort = new AbortController();
    button.disabled = true;
    form.setAttribute("aria-busy", "true");
    if (stop) Object.assign(stop, { disabled: false, onclick: () => abort.abort() });
    showError("");
    try {
      if (!form.elements.model.value) throw new Error("The server has no model for this.");
      await task(form.elements, abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") showError(error.message);
    } finally {
      button.disabled = false;
      form.removeAttribute("aria-busy");
      if (stop) stop.disabled = true;
    }
  });
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// Tabs, as screen readers expect them: arrow keys move between them

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const other of tabs) {
    const on = other === tab;
    other.setAttribute("aria-selected", on);
    other.tabIndex = on ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !on;
  }
  showError("");
}

for (const [index, tab] of tabs.entries()) {
  tab.onclick = () => select(tab);
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
  };
}

async function listModels() {
  const { data } = await (await call("v1/models")).json();
  for (const list of document.querySelectorAll("select")) {
    const fitting = data.filter((model) => model.family === list.dataset.family);
    list.replaceChildren(...fitting.map(({ id }) => make("option", { value: id }, id)));
    list.disabled = !fitting.length;
  }
  const chat = data.some((model) => model.family === $("ask").elements.model.dataset.family);
  select(chat ? tabs[0] : tabs[1]);
}

const area = $("drop");
$("files").onchange = (event) => {
  add(event.target.files);
  event.target.value = "";
};
document.ondragover = (event) => {
  event.preventDefault();
  area.classList.add("over");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) area.classList.remove("over");
};
document.ondrop = (event) => {
  event.preventDefault();
  area.classList.remove("over");
  add(event.dataTransfer.files);
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
};
$("clear").onclick = () => {
  for (const button of document.querySelectorAll("#shown button")) button.click();
};
$("ask").elements.question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("key-button").onclick = () => {
  setKey("");
  listModels().catch((error) => showError(error.message));
};

connect("ask", ask);
connect("classify", classify);
connect("features", features);
select(tabs[0]);
listModels().catch((error) => showError(error.message));
