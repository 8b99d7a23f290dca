// The page of `perception-rt serve`. It speaks to the server's own routes and to nothing else.

import { boxesOf } from "./boxes.js";
import { call, events, setKey } from "./client.js";
import { $, make } from "./dom.js";

const MOST_MIB = 128; // of all files: browsers crash with texts of several hundred MiB

let media = []; // {file, kind, url, frame, name, seen} of the images and videos shown
let turns = []; // the conversation: see `newTurn`

// Images and videos

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name}: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

function add(files) {
  showError("");
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") {
      showError(`${file.name} is neither an image nor a video`);
      continue;
    }
    const bytes = media.reduce((sum, item) => sum + item.file.size, file.size);
    if (bytes > MOST_MIB * 2 ** 20) {
      showError(`${file.name} is too large: the page sends ${MOST_MIB} MiB of files at most`);
      continue;
    }
    const url = URL.createObjectURL(file);
    const view = kind === "image" ? make("img", { alt: file.name }) : make("video");
    Object.assign(view, { src: url, controls: true, muted: true });
    const name = make("span");
    const frame = make("div", { className: "frame" }, view);
    const item = { file, kind, url, frame, name, seen: true };
    view.onerror = () => {
      item.seen = false;
      changed();
    };
    const remove = make("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const caption = make("figcaption", { className: "note" }, name, remove);
    const row = make("li", {}, make("figure", {}, item.frame, caption));
    remove.onclick = () => drop(item, row);
    media.push(item);
    $("shown").append(row);
  }
  changed();
}

function drop(item, row) {
  URL.revokeObjectURL(item.url);
  row.remove();
  media = media.filter((other) => other !== item);
  changed();
  $("files").focus();
}

/** Updates what depends on the images and videos shown. Beside others, images have numbers. */
function changed() {
  const found = media.filter((item) => item.kind === "image");
  for (const { file, name, seen } of media) {
    name.textContent = seen ? file.name : `${file.name} (this browser cannot show it)`;
  }
  if (media.length > 1) found.forEach(({ name }, i) => name.prepend(`Image ${i + 1}: `));
  $("clear").hidden = media.length < 2;
  drawBoxes();
}

/** The images shown; an error if there are none or too many. */
function images(most = Infinity) {
  const found = media.filter((item) => item.kind === "image");
  if (!found.length) throw new Error("Choose an image first.");
  if (found.length > most) throw new Error("Choose one image only.");
  return found;
}

/** Draws the boxes of the last answer, and says under it why some are not drawn. */
function drawBoxes() {
  for (const old of document.querySelectorAll(".box")) old.remove();
  const turn = turns.at(-1);
  if (!turn) return;
  const { boxes, note } = boxesOf(turn);
  turn.boxNote.textContent = note;
  for (const { item, corners, number, text } of boxes) {
    const [x1, y1, x2, y2] = corners.map((value) => value / 10);
    const box = make("div", { className: "box", title: text }, make("span", {}, String(number)));
    box.style.left = `${x1}%`;
    box.style.top = `${y1}%`;
    box.style.width = `${x2 - x1}%`;
    box.style.height = `${y2 - y1}%`;
    item.frame.append(box);
  }
}

// Tasks

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/**
 * A question and its answer.
 *
 * Images and videos are sent once, with the first question after they were added; `about` are those
 * of the latest question that brought some. `images` are all images by number.
 */
function newTurn(question) {
  const sent = new Set(turns.flatMap((turn) => turn.added));
  const added = media.filter((item) => !sent.has(item));
  const turn = {
    question,
    added,
    about: added.length ? added : (turns.at(-1)?.about ?? []).filter((i) => media.includes(i)),
    images: media.filter((item) => item.kind === "image"),
    answer: "",
    text: make("p", { className: "answer" }),
    note: make("p", { className: "note" }),
    boxNote: make("p", { className: "note" }),
  };
  const names = added.map((item) => item.file.name).join(", ");
  const asked = make("p", { className: "question" }, question);
  const files = make("p", { className: "note", hidden: !names }, names);
  turn.row = make("li", {}, asked, files, turn.text, turn.note, turn.boxNote);
  return turn;
}

/** The messages of a turn with these of its images and videos. */
async function messagesOf({ question, answer }, items) {
  const content = await Promise.all(
    items.map(async ({ file, kind }) => ({
      type: `${kind}_url`,
      [`${kind}_url`]: { url: await dataUrl(file) },
    })),
  );
  content.push({ type: "text", text: question });
  return [{ role: "user", content }, { role: "assistant", content: answer }];
}

async function ask(form, signal, sent) {
  const turn = newTurn(form.question.value.trim());
  if (!turn.question) throw new Error("Write a question first.");
  setTurns([...turns, turn]);
  form.question.value = "";
  try {
    await answer(turn, form, signal, sent);
  } catch (error) {
    turn.note.textContent = error.name === "AbortError" ? "Stopped" : "Incomplete";
    if (!turn.answer && turns.includes(turn)) {
      setTurns(turns.filter((other) => other !== turn));
      form.question.value ||= turn.question;
    }
    throw error;
  }
}

async function answer(turn, form, signal, sent) {
  // What was removed from the page is no longer sent.
  sent.push(...turns.map(({ added }) => added.filter((item) => media.includes(item))));
  const messages = await Promise.all(turns.map((each, i) => messagesOf(each, sent[i])));
  const body = {
    model: form.model.value,
    messages: messages.flat().slice(0, -1),
    max_tokens: form.most.valueAsNumber,
    temperature: form.temperature.valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await call("v1/chat/completions", body, signal);
  for await (const data of events(response)) {
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Error(error.message);
    const choice = choices[0];
    if (choice?.delta.content) {
      turn.answer += choice.delta.content;
      turn.text.append(choice.delta.content);
      $("talk").scrollTop = $("talk").scrollHeight;
      drawBoxes();
    }
    if (choice?.finish_reason === "length") turn.note.textContent = "Cut off. ";
    if (usage) {
      const { prompt_tokens, completion_tokens } = usage;
      turn.note.append(`Tokens: ${prompt_tokens} read, ${completion_tokens} written`);
    }
  }
}

function setTurns(list) {
  turns = list;
  $("talk").replaceChildren(...turns.map((turn) => turn.row));
  $("talk").scrollTop = $("talk").scrollHeight;
  $("ask").elements.restart.disabled = !turns.length;
  drawBoxes();
}

async function classify(form, signal, sent) {
  const shown = images();
  sent.push(shown);
  const urls = await Promise.all(shown.map((item) => dataUrl(item.file)));
  const body = { model: form.model.value, images: urls, labels: lines(form.labels.value) };
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

async function features(form, signal, sent) {
  sent.push(images(1));
  const image = await dataUrl(sent[0][0].file);
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
    const sent = []; // lists of images and videos, one per question
    button.disabled = true;
    form.setAttribute("aria-busy", "true");
    if (stop) Object.assign(stop, { disabled: false, onclick: () => abort.abort() });
    showError("");
    try {
      if (!form.elements.model.value) await listModels();
      if (!form.elements.model.value) throw new Error("The server has no model for this.");
      await task(form.elements, abort.signal, sent);
    } catch (error) {
      if (error.name !== "AbortError") showError(withName(error.message, sent));
    } finally {
      button.disabled = false;
      form.removeAttribute("aria-busy");
      if (stop) stop.disabled = true;
    }
  });
}

/** A message of the server with the name of a file instead of its number in the request. */
function withName(message, sent) {
  const number = /^(?:history (\d+): )?(image|video) (\d+)(?=: )/;
  return message.replace(number, (found, question, kind, index) => {
    const items = question ? sent[question] : sent.at(-1);
    return items?.filter((item) => item.kind === kind)[index]?.file.name ?? found;
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
$("ask").elements.restart.onclick = () => {
  $("ask").elements.stop.click();
  setTurns([]);
  showError("");
  $("ask").elements.question.focus();
};
$("key-button").onclick = () => {
  setKey("");
  listModels().catch((error) => showError(error.message));
};

connect("ask", ask);
connect("classify", classify);
connect("features", features);
select(tabs[0]);
listModels()
  .then(() => select($("ask").elements.model.value ? tabs[0] : tabs[1]))
  .catch((error) => showError(error.message));
