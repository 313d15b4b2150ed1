"use strict";
// Markdown within a line to DOM nodes: text nodes and createElement alone, so no text is ever read as HTML.

const MAX_INLINE = 20000; // characters: a longer paragraph is no prose, and stays plain
const MAX_OPEN = 16; // marks that wait for their partner: bounds the nesting and every search for one
const MAX_TICKS = 8;

const MARKS = new RegExp(
  [
    /(?<math>\\\([^\n]{1,500}?\\\)|\\\[[^]{1,2000}?\\\])/,
    /(?<wrap>\\?\n|<br ?\/?>)/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<ticks>`+)/,
    /<(?<angled>(?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/,
    /(?<![A-Za-z0-9])(?<bare>https?:\/\/[^\s<>*`"|]{1,2000})/,
    /(?<open>!?\[)/,
    /(?<close>\])/,
    /(?<run>\*+|_+|~~)/,
    /&(?<entity>amp|lt|gt|quot|nbsp);/,
  ].map((part) => part.source).join("|"),
  "g",
);
const TARGET = /\([ \t]*<?((?:[^\s()<>]|\([^\s()<>]*\)){1,2000})>?(?:[ \t]+"[^"\n]*")?[ \t]*\)/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0" };
const SCHEMES = ["http:", "https:", "mailto:"];

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

// The address as the browser will follow it; null for a relative one and for any other scheme.
function safeAddress(text) {
  if (!URL.canParse(text)) return null;
  const url = new URL(text);
  return SCHEMES.includes(url.protocol) ? url.href : null;
}

function makeLink(address) {
  const link = make("a");
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  return link;
}

// Where a bare address ends in running text: not with the sentence's punctuation, nor its bracket.
function trimAddress(address) {
  let end = address.length;
  let unopened = address.split(")").length - address.split("(").length;
  for (; end > 0; end -= 1) {
    const last = address[end - 1];
    if (last === ")" && unopened > 0) unopened -= 1;
    else if (!".,;:!?'_~]".includes(last)) break;
  }
  return address.slice(0, end);
}

class InlineParser {
  // growing: more of the text is to come, so a bold or code mark without its partner is taken at its word.
  constructor(text, growing) {
    this.text = text;
    this.growing = growing;
    this.nodes = [];
    this.open = []; // marks without a partner so far: {mark, count, at: the index of its text in nodes}
    this.plain = "";
  }

  parse() {
    if (this.text.length > MAX_INLINE) return [new Text(this.text)];
    const marks = new RegExp(MARKS);
    let end = 0;
    for (let match = marks.exec(this.text); match; match = marks.exec(this.text)) {
      this.plain += this.text.slice(end, match.index);
      end = this.take(match);
      marks.lastIndex = end;
    }
    this.plain += this.text.slice(end);
    this.flush();
    if (this.growing) this.closeBold();
    return this.nodes;
  }

  // Deal with one mark and return where the text goes on.
  take(match) {
    const { math, wrap, escaped, ticks, angled, bare, open, close, run, entity } = match.groups;
    const end = match.index + match[0].length;
    if (math) this.add(make("code", "math", math));
    else if (wrap) this.add(make("br"));
    else if (escaped) this.plain += escaped;
    else if (ticks) return this.code(ticks.length, match.index);
    else if (angled) this.address(angled, angled);
    else if (bare) return this.address(trimAddress(bare), bare, match.index);
    else if (open) this.opener(open, 1);
    else if (close) return this.link(end);
    else if (run) this.emphasis(run, match.index);
    else this.plain += ENTITIES[entity];
    return end;
  }

  flush() {
    if (this.plain) this.nodes.push(new Text(this.plain));
    this.plain = "";
  }

  add(node) {
    this.flush();
    this.nodes.push(node);
  }

  opener(mark, count) {
    if (this.open.length >= MAX_OPEN) {
      this.plain += mark.repeat(count);
      return;
    }
    this.flush();
    this.open.push({ mark, count, at: this.nodes.length });
    this.nodes.push(new Text(mark.repeat(count)));
  }

  // Put all that follows an open mark into an element; marks still open inside it stay text.
  enclose(index, element) {
    this.flush();
    element.append(...this.nodes.splice(this.open[index].at + 1));
    this.nodes.push(element);
    this.open.length = index + 1;
  }

  // Use up part of the innermost open mark: what is left of it goes on being one.
  spend(count) {
    const opener = this.open.at(-1);
    opener.count -= count;
    if (opener.count > 0) {
      this.nodes[opener.at].data = opener.mark.repeat(opener.count);
    } else {
      this.nodes.splice(opener.at, 1);
      this.open.pop();
    }
  }

  address(shown, written, start = 0) {
    const target = safeAddress(shown);
    if (target === null) {
      this.plain += written;
      return start + written.length;
    }
    const link = makeLink(target);
    link.textContent = shown;
    this.add(link);
    return start + shown.length;
  }

  code(ticks, start) {
    const from = start + ticks;
    let end = -1;
    if (ticks <= MAX_TICKS) {
      const closing = new RegExp(`(?<!\`)\`{${ticks}}(?!\`)`, "g");
      closing.lastIndex = from;
      end = closing.exec(this.text)?.index ?? (this.growing ? this.text.length : -1);
    }
    if (end < 0) {
      this.plain += "`".repeat(ticks);
      return from;
    }
    let code = this.text.slice(from, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    this.add(make("code", "", code));
    return Math.min(end + ticks, this.text.length);
  }

  // A closing bracket: a link when an address follows that may be followed. A picture is a link too: to show
  // it would be a request to a host of the model's choice.
  link(end) {
    const index = this.open.findLastIndex(({ mark }) => mark.endsWith("["));
    TARGET.lastIndex = end;
    const target = index < 0 ? null : TARGET.exec(this.text);
    const address = target && safeAddress(target[1]);
    if (!address) {
      if (index >= 0) this.open.splice(index, 1);
      this.plain += "]";
      return end;
    }
    this.enclose(index, makeLink(address));
    this.spend(1);
    this.open = this.open.filter(({ mark }) => !mark.endsWith("[")); // no link within a link
    return end + target[0].length;
  }

  emphasis(run, start) {
    const before = this.text[start - 1] ?? " ";
    const after = this.text[start + run.length] ?? " ";
    const isSpace = (character) => /\s/.test(character);
    const isPoint = (character) => /[\p{P}\p{S}]/u.test(character);
    const left = !isSpace(after) && (!isPoint(after) || isSpace(before) || isPoint(before));
    const right = !isSpace(before) && (!isPoint(before) || isSpace(after) || isPoint(after));
    const mark = run[0];
    const opens = left && (mark !== "_" || !right || isPoint(before));
    const closes = right && (mark !== "_" || !left || isPoint(after));
    let count = run.length;
    if (count > 3) {
      this.plain += run;
      return;
    }
    while (closes && count > 0) {
      const index = this.open.findLastIndex((opener) => opener.mark === mark);
      if (index < 0) break;
      const used = Math.min(count, this.open[index].count, 2);
      this.enclose(index, make(mark === "~" ? "s" : used === 2 ? "strong" : "em"));
      this.spend(used);
      count -= used;
    }
    if (count > 0 && opens) this.opener(mark, count);
    else this.plain += mark.repeat(count);
  }

  closeBold() {
    for (let index = this.open.length - 1; index >= 0; index -= 1) {
      const { mark, count } = this.open[index];
      if (mark !== "*" || count !== 2) continue;
      this.enclose(index, make("strong"));
      this.spend(2);
    }
  }
}

function appendInline(element, text, growing = false) {
  element.append(...new InlineParser(text, growing).parse());
  element.normalize();
}
