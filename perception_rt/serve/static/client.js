// Requests to the server, and the API key that they carry.

import { $ } from "./dom.js";

const KEY = "perception_rt.key";

let key = sessionStorage.getItem(KEY) ?? "";

/** Sends a request; asks for an API key as often as the server wants another one. */
export async function call(path, body, signal) {
  for (;;) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = { headers, signal };
    if (body) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await connected(fetch(path, options));
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reason(response));
    await askForKey(key !== "");
  }
}

/** What a request or a part of its answer resolves to; browsers do not name a lost connection. */
async function connected(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server closed the connection or does not answer.");
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

export function setKey(value) {
  key = value;
  sessionStorage.setItem(KEY, key);
}

/** Data of server-sent events, each of which ends with an empty line, up to [DONE]. */
export async function* events(response) {
  const reader = response.body.getReader(); // a pipe would lose text when the connection breaks
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await connected(reader.read());
    if (done) throw new Error("The answer ended early: the server closed the connection.");
    const parts = (text + decoder.decode(value, { stream: true })).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield data;
    }
  }
}
