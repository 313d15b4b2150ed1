"use strict";
// A conversation's turns: what the server says becomes data, the data becomes the page.

function newAnswer() {
  return {
    role: "assistant",
    content: "",
    reasoning: "",
    live: true,
    chunks: 0,
    waitedFor: 0, // milliseconds, as long as no text has come
    firstAfter: null, // milliseconds from the request to the first text
    thoughtFor: null, // milliseconds from then to the answer proper
    writtenFor: 0, // milliseconds from the first text to the last
    usage: null,
    note: "", // why the answer is not whole
  };
}

const NOTES = {
  length: "The answer ends here because its limit of tokens was reached.",
  tool_calls: "The model called a function; this page offers none.",
  content_filter: "The answer was withheld.",
};

// Take one chunk of the stream into an answer. elapsed: milliseconds since the request.
function takeChunk(answer, chunk, elapsed) {
  const [choice] = chunk.choices ?? [];
  const reasoning = choice?.delta?.reasoning ?? "";
  const content = choice?.delta?.content ?? "";
  if (reasoning || content) {
    answer.firstAfter ??= elapsed;
    answer.writtenFor = elapsed - answer.firstAfter;
    answer.chunks += 1;
  }
  if (content) answer.thoughtFor ??= answer.writtenFor;
  answer.reasoning += reasoning;
  answer.content += content;
  if (choice?.finish_reason) answer.note = NOTES[choice.finish_reason] ?? "";
  if (chunk.usage) answer.usage = chunk.usage;
}

// What is sent back to the model: answers without their reasoning, and none that has no text.
function toMessages(instructions, turns) {
  const said = turns.filter(({ content }) => content !== "").map(({ role, content }) => ({ role, content }));
  return instructions ? [{ role: "developer", content: instructions }, ...said] : said;
}

const inSeconds = (milliseconds) => {
  const seconds = milliseconds / 1000;
  return `${seconds.toFixed(seconds < 1 ? 2 : seconds < 10 ? 1 : 0)} s`;
};
const grouped = (count) => count.toLocaleString("en");

function describeRate(answer) {
  // A chunk is a token or a few, so before the server has counted the rate is only about right.
  const tokens = answer.usage?.completion_tokens ?? answer.chunks;
  if (tokens < 2 || answer.writtenFor <= 0) return [];
  const rate = ((tokens - 1) * 1000) / answer.writtenFor;
  return [`${answer.usage ? "" : "≈ "}${rate.toFixed(rate < 100 ? 1 : 0)} tok/s`];
}

function describeUsage(usage) {
  const { completion_tokens: written, prompt_tokens: prompt } = usage;
  const reasoning = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return [
    `${grouped(written)} tokens${reasoning ? `, ${grouped(reasoning)} of thought` : ""}`,
    `prompt ${grouped(prompt)}${cached ? `, ${grouped(cached)} cached` : ""}`,
  ];
}

function describe(answer) {
  if (answer.firstAfter === null) {
    return answer.live && answer.waitedFor > 0 ? [`waiting for ${inSeconds(answer.waitedFor)}`] : [];
  }
  const usage = answer.usage ? describeUsage(answer.usage) : [];
  return [...describeRate(answer), `first after ${inSeconds(answer.firstAfter)}`, ...usage];
}

function makeButton(label, action) {
  const button = make("button", `quiet ${action}`, label);
  button.type = "button";
  button.dataset.action = action;
  return button;
}

function makeQuestion(turn) {
  const article = make("article", "question");
  const actions = make("footer");
  actions.append(makeButton("Edit", "edit"));
  const said = make("div", "said", turn.content);
  said.dir = "auto";
  article.append(make("h2", "unseen", "You"), said, actions);
  return article;
}

class AnswerView {
  constructor() {
    this.node = make("article", "answer");
    this.thought = make("details", "thought");
    this.summary = make("summary");
    this.reasoning = new Text();
    const reasoning = make("div", "reasoning");
    reasoning.dir = "auto";
    reasoning.append(this.reasoning);
    this.thought.append(this.summary, reasoning);
    this.body = make("div", "markdown");
    this.markdown = new MarkdownView(this.body);
    this.note = make("p", "note");
    this.stats = make("span", "stats");
    this.statsDrawn = 0;
    const actions = make("footer");
    actions.append(makeButton("Copy", "copy"), makeButton("Retry", "retry"), this.stats);
    this.node.append(make("h2", "unseen", "Answer"), this.thought, this.body, this.note, actions);
  }

  draw(answer) {
    const isThinking = answer.live && answer.content === "";
    this.node.classList.toggle("live", answer.live);
    this.node.classList.toggle("waiting", isThinking && answer.reasoning === "");
    this.node.classList.toggle("thinking", isThinking);
    this.node.setAttribute("aria-busy", String(answer.live));
    this.thought.hidden = answer.reasoning === "";
    const thoughtFor = answer.thoughtFor ?? answer.writtenFor;
    this.summary.textContent = isThinking ? "Thinking…" : `Thought for ${inSeconds(thoughtFor)}`;
    growText(this.reasoning, answer.reasoning);
    this.markdown.draw(answer.content, answer.live);
    this.note.textContent = answer.note;
    this.note.hidden = answer.note === "";
    if (answer.live && performance.now() < this.statsDrawn + 400) return; // figures that flicker are not read
    this.statsDrawn = performance.now();
    this.stats.replaceChildren(...describe(answer).map((part) => make("span", "", part)));
  }
}
