"use strict";
// The page itself: what is typed, clicked and pressed, and the answer that is being written.

const log = document.querySelector("#log");
const form = document.querySelector("#composer");
const box = document.querySelector("#message");
const send = document.querySelector("#send");
const announcer = document.querySelector("#announcer");
const keyDialog = document.querySelector("#key-dialog");
const settingsDialog = document.querySelector("#settings-dialog");
const settings = { effort: "medium", instructions: "", temperature: "", ...store.read("settings") };

let turns = store.read("turns") ?? [];
let modelName = null;
let running = null; // the AbortController of the answer being written
let isEditing = false;

// -- showing ----------------------------------------------------------------------------------------------

function showState() {
  document.body.classList.toggle("busy", running !== null);
  document.body.classList.toggle("editing", isEditing);
  document.body.classList.toggle("empty", turns.length === 0);
  const canSend = running !== null || box.value.trim() !== "";
  send.setAttribute("aria-disabled", String(!canSend));
  send.setAttribute("aria-label", running === null ? "Send" : "Stop");
  send.title = running === null ? "Send (Enter)" : "Stop (Escape)";
}

function showModel(name, isFault = false) {
  const label = document.querySelector("#model");
  label.textContent = name;
  label.classList.toggle("fault", isFault);
}

// Say something to those who listen to the page. Only starts and ends are said, never single tokens.
function announce(text) {
  announcer.textContent = text;
}

// Drop the turns from this one on, and what shows them.
function cutTurns(count) {
  turns = turns.slice(0, count);
  while (log.children.length > count) log.lastElementChild.remove();
}

function addTurn(turn) {
  turns.push(turn);
  if (turn.role === "user") {
    log.append(makeQuestion(turn));
    return null;
  }
  const view = new AnswerView();
  view.draw(turn);
  log.append(view.node);
  return view;
}

// -- the key ----------------------------------------------------------------------------------------------

// Ask for the API key; null when the reader would rather not.
function askKey() {
  document.querySelector("#key-refused").hidden = !apiKey;
  const field = document.querySelector("#key");
  field.value = "";
  keyDialog.returnValue = "";
  keyDialog.showModal();
  return new Promise((resolve) => {
    keyDialog.addEventListener(
      "close",
      () => resolve(keyDialog.returnValue === "use" ? field.value.trim() : null),
      { once: true },
    );
  });
}

async function withKey(call) {
  for (;;) {
    try {
      return await call();
    } catch (error) {
      if (error.status !== 401) throw error;
      const key = await askKey();
      if (!key) throw error;
      rememberKey(key);
    }
  }
}

// -- asking and answering ---------------------------------------------------------------------------------

function toRequest() {
  const body = {
    model: modelName,
    messages: toMessages(settings.instructions.trim(), turns),
    reasoning_effort: settings.effort,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  return body;
}

async function learnModel() {
  modelName ??= await withKey(fetchModelName);
  showModel(modelName);
}

// Have the model answer the turns so far, of which the last is a question.
async function answerTurns() {
  const control = new AbortController();
  running = control;
  const body = toRequest();
  const answer = newAnswer();
  const view = addTurn(answer);
  showState();
  goToEnd();
  announce("Waiting for the answer.");
  const draw = () => painter.ask(() => view.draw(answer));
  let started = performance.now();
  const clock = setInterval(() => {
    if (answer.firstAfter === null) answer.waitedFor = performance.now() - started;
    draw();
  }, 1000);
  try {
    await learnModel();
    body.model = modelName;
    await withKey(() => {
      started = performance.now();
      return streamChat(body, control.signal, (chunk) => {
        takeChunk(answer, chunk, performance.now() - started);
        draw();
      });
    });
  } catch (error) {
    answer.note = control.signal.aborted ? "Stopped." : error.message;
    view.note.classList.toggle("fault", !control.signal.aborted);
  }
  clearInterval(clock);
  answer.live = false;
  view.draw(answer);
  followEnd();
  if (running !== control) return; // another conversation has begun
  running = null;
  showState();
  announce(answer.note || (answer.content.length < 400 ? answer.content : "The answer is complete."));
}

function submit() {
  const content = box.value.trim();
  if (running !== null || content === "") return;
  if (isEditing) cutTurns(lastQuestion());
  isEditing = false;
  box.value = "";
  fitBox();
  addTurn({ role: "user", content });
  answerTurns();
}

function stop() {
  running?.abort();
}

const lastQuestion = () => turns.findLastIndex(({ role }) => role === "user");

function startOver() {
  stop();
  running = null;
  isEditing = false;
  cutTurns(0);
  announce("A new conversation.");
  showState();
  focusBox();
}

function setEditing(on) {
  isEditing = on;
  box.value = on ? turns[lastQuestion()].content : "";
  fitBox();
  showState();
  box.focus();
}

// -- copying ----------------------------------------------------------------------------------------------

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Over plain HTTP from another machine a browser offers no clipboard but by a selection.
  const area = make("textarea", "unseen");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("The browser does not let this page copy.");
}

async function copyBy(button, text) {
  try {
    await copyText(text);
    button.textContent = "Copied";
    announce("Copied.");
  } catch {
    button.textContent = "Not copied";
    announce("The browser does not let this page copy.");
  }
  button.focus();
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

const ACTIONS = {
  "copy-code": (button) => copyBy(button, button.closest("figure").querySelector("code").textContent),
  copy: (button) => copyBy(button, turns[[...log.children].indexOf(button.closest("article"))].content),
  retry: () => {
    cutTurns(lastQuestion() + 1);
    answerTurns();
    focusBox();
  },
  edit: () => setEditing(true),
};

// -- events -----------------------------------------------------------------------------------------------

// Not on glass, where it would raise the keyboard.
function focusBox() {
  if (matchMedia("(pointer: fine)").matches) box.focus();
}

// Grow the box with its text, where the style sheet alone cannot.
function fitBox() {
  if (CSS.supports("field-sizing", "content")) return;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

log.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) ACTIONS[button.dataset.action](button);
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running === null) submit();
  else stop();
});

box.addEventListener("input", () => {
  fitBox();
  showState();
});

box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  // Glass has no Shift+Enter: there Enter makes a line, and the button sends.
  if (matchMedia("(pointer: coarse)").matches && !event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running !== null) stop();
  else if (isEditing) setEditing(false);
});

toLatest.addEventListener("click", () => {
  goToEnd();
  focusBox();
});
document.querySelector("#no-key").addEventListener("click", () => keyDialog.close());
document.querySelector("#cancel-edit").addEventListener("click", () => setEditing(false));
document.querySelector("#start-over").addEventListener("click", startOver);
document.querySelector("#open-settings").addEventListener("click", () => settingsDialog.showModal());

// A phone may drop a page that is out of sight, and a reload drops any.
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState !== "hidden") return;
  store.write(
    "turns",
    turns.map((turn) => (turn.live ? { ...turn, live: false, note: "Stopped." } : turn)),
  );
});

for (const field of document.querySelectorAll("[data-setting]")) {
  const { setting } = field.dataset;
  if (field.type === "radio") field.checked = field.value === settings[setting];
  else field.value = settings[setting];
  field.addEventListener("change", () => {
    settings[setting] = field.validity.valid ? field.value : settings[setting];
    store.write("settings", settings);
  });
}

for (const turn of turns.splice(0)) addTurn(turn);
showState();
followEnd();
focusBox();
learnModel().catch((error) => showModel(error.status === 401 ? "key needed" : "no connection", true));
