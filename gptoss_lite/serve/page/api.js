"use strict";
// The server's API: requests with the key, errors in the server's words, the stream's chunks one by one.

// What outlives a reload lies in sessionStorage: no other tab sees it, and it goes with this one.
const store = {
  read(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`gptoss-lite.${name}`));
    } catch {
      return null; // storage is forbidden here: the page lives without
    }
  },
  write(name, value) {
    try {
      sessionStorage.setItem(`gptoss-lite.${name}`, JSON.stringify(value));
    } catch {
      // forbidden or full
    }
  },
};

class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let apiKey = store.read("key");

function rememberKey(key) {
  apiKey = key;
  store.write("key", key);
}

async function readError(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  }
}

// The addresses are relative, so that the page also works where a proxy serves it under a path.
async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw new ApiError(await readError(response), response.status);
  return response;
}

async function fetchModelName() {
  const { data } = await (await request("v1/models")).json();
  return data[0].id;
}

// The data of each server-sent event; comments, which keep the connection alive, are passed over.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).trimStart());
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Ask for an answer and hand each chunk of it on; returns at its end, throws where there is none.
async function streamChat(body, signal, take) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", options);
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      take(chunk);
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
  throw new ApiError("The connection closed before the answer was complete.");
}
