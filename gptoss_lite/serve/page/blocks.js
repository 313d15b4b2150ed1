"use strict";
// Markdown by blocks, drawn while it grows: finished blocks are left alone, the last one is patched in place.

const MAX_DEPTH = 12; // of lists and quotes within one another; what is deeper stays text
const TAB = 4;

const FENCE = /^([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const INTERRUPTING_ITEM = /^[ \t]*(?:[-*+]|1[.)])[ \t]+\S/;
const MATH = /^ {0,3}(\\\[|\$\$)/;
const MAX_MATH = 100; // lines

// Not append(...nodes): a call takes only so many arguments, and there may be more blocks.
function fill(element, nodes) {
  for (const node of nodes) element.append(node);
}

const isBlank = (line) => line.trim() === "";

// The width of a line's leading white space, in columns.
function indentOf(line) {
  let width = 0;
  for (const character of line) {
    if (character === " ") width += 1;
    else if (character === "\t") width += TAB;
    else break;
  }
  return width;
}

// The line without its leading white space, as far as that lies within so many columns.
function outdent(line, columns) {
  let start = 0;
  for (let width = 0; width < columns; start += 1) {
    if (line[start] === " ") width += 1;
    else if (line[start] === "\t") width += TAB;
    else break;
  }
  return line.slice(start);
}

function startsTable(lines, at) {
  const delimiters = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !delimiters.includes("-") || delimiters.length > 2000) return false;
  return splitRow(delimiters).every((cell) => /^:?-+:?$/.test(cell));
}

function startsBlock(lines, at) {
  const line = lines[at];
  const simple = [FENCE, HEADING, RULE, QUOTE, INTERRUPTING_ITEM, MATH].some((start) => start.test(line));
  return simple || startsTable(lines, at);
}

// Each reader below takes the lines and where its block starts, and returns its node and where the next starts.
// growing: more text is to come, which matters to a block that reaches the end.

function readFence(lines, at) {
  const [, indent, fence, info] = FENCE.exec(lines[at]);
  const closes = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  const code = [];
  let next = at + 1;
  for (; next < lines.length && !closes(lines[next]); next += 1) {
    code.push(outdent(lines[next], indentOf(indent)));
  }
  const box = make("figure", "code");
  const caption = make("figcaption");
  const copy = make("button", "quiet", "Copy");
  copy.type = "button";
  copy.dataset.action = "copy-code";
  caption.append(make("span", "", info.trim().split(/\s/)[0].slice(0, 40) || "text"), copy);
  const pre = make("pre");
  pre.append(make("code", "", code.join("\n")));
  box.append(caption, pre);
  return [box, next + 1];
}

function readHeading(lines, at, growing) {
  const [, marks, text] = HEADING.exec(lines[at]);
  // The page's own title and speakers are h1 and h2.
  const heading = make(`h${Math.min(marks.length + 2, 6)}`, `level-${marks.length}`);
  appendInline(heading, text ?? "", growing && at + 1 === lines.length);
  return [heading, at + 1];
}

function readQuote(lines, at, growing, depth) {
  const inside = [];
  let next = at;
  for (; next < lines.length && QUOTE.test(lines[next]); next += 1) {
    inside.push(lines[next].replace(QUOTE, ""));
  }
  const quote = make("blockquote");
  fill(quote, readBlocks(inside, growing && next === lines.length, depth + 1).nodes);
  return [quote, next];
}

function readList(lines, at, growing, depth) {
  const base = indentOf(lines[at]);
  const isOrdered = (mark) => /\d/.test(mark);
  const firstMark = ITEM.exec(lines[at])[1];
  const list = make(isOrdered(firstMark) ? "ol" : "ul", "tight");
  if (isOrdered(firstMark)) list.start = Number.parseInt(firstMark, 10);
  let item = null; // the lines of the open item, and the column that its text starts at
  const close = (isGrowing) => {
    if (item === null) return;
    const entry = make("li");
    item.lines[0] = item.lines[0].replace(/^\[([ xX])\] /, (_, mark) => (mark === " " ? "☐ " : "☑ "));
    fill(entry, readBlocks(item.lines, isGrowing, depth + 1).nodes);
    list.append(entry);
  };
  let next = at;
  while (next < lines.length) {
    let ahead = next;
    while (ahead < lines.length && isBlank(lines[ahead])) ahead += 1;
    if (ahead === lines.length) break;
    const line = lines[ahead];
    const indent = indentOf(line);
    const match = RULE.test(line) ? null : ITEM.exec(line);
    if (match && indent < base + 2 && isOrdered(match[1]) === isOrdered(firstMark)) {
      if (ahead > next) list.className = "loose";
      close(false);
      item = { lines: [match[3] ?? ""], text: indent + match[1].length + 1, inside: null };
    } else if (indent >= base + 2) {
      // Two columns are enough to be inside, whatever the mark's width: models often write no more.
      item.inside ??= Math.min(item.text, indent);
      for (; next < ahead; next += 1) item.lines.push("");
      if (item.lines.at(-1) === "") list.className = "loose";
      item.lines.push(outdent(line, item.inside));
    } else if (ahead === next && !startsBlock(lines, ahead)) {
      item.lines.push(line.trim());
    } else {
      break;
    }
    next = ahead + 1;
  }
  close(growing && next === lines.length);
  return [list, next];
}

function splitRow(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readTable(lines, at, growing) {
  const aligned = splitRow(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "";
  });
  const row = (index, name) => {
    const cells = make("tr");
    for (const [column, text] of splitRow(lines[index]).slice(0, aligned.length).entries()) {
      const cell = make(name, aligned[column]);
      appendInline(cell, text, growing && index + 1 === lines.length);
      cells.append(cell);
    }
    return cells;
  };
  const head = make("thead");
  head.append(row(at, "th"));
  const body = make("tbody");
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) body.append(row(next, "td"));
  const table = make("table");
  table.append(head, body);
  const box = make("div", "table");
  box.append(table);
  return [box, next];
}

// Formulas are shown as they are written: only their marks must not be taken for Markdown. null where none ends.
function readMath(lines, at, growing) {
  const [opening, mark] = MATH.exec(lines[at]);
  const closing = mark === "$$" ? "$$" : "\\]";
  const closes = (line) => line.trimEnd().endsWith(closing);
  const limit = Math.min(lines.length, at + MAX_MATH);
  let end = at;
  if (!closes(lines[at].slice(opening.length))) {
    do end += 1;
    while (end < limit && !isBlank(lines[end]) && !closes(lines[end]));
  }
  const isClosed = end < limit && !isBlank(lines[end]);
  const mayClose = growing && end >= lines.length - 1; // the last line may not be whole
  if (!isClosed && !mayClose) return null;
  const formula = lines.slice(at, end + 1).map((line) => line.trim());
  return [make("div", "math", formula.join("\n").trimEnd()), Math.min(end + 1, lines.length)];
}

function readParagraph(lines, at, growing, depth) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && (depth > MAX_DEPTH || !startsBlock(lines, next))) {
    next += 1;
  }
  const paragraph = make("p");
  const text = lines.slice(at, next).map((line) => line.trim());
  appendInline(paragraph, text.join("\n"), growing && next === lines.length);
  return [paragraph, next];
}

function readBlock(lines, at, growing, depth) {
  const line = lines[at];
  if (depth > MAX_DEPTH) return readParagraph(lines, at, growing, depth);
  if (FENCE.test(line)) return readFence(lines, at);
  if (HEADING.test(line)) return readHeading(lines, at, growing);
  if (RULE.test(line)) return [make("hr"), at + 1];
  if (QUOTE.test(line)) return readQuote(lines, at, growing, depth);
  if (ITEM.test(line)) return readList(lines, at, growing, depth);
  if (startsTable(lines, at)) return readTable(lines, at, growing);
  return (MATH.test(line) && readMath(lines, at, growing)) || readParagraph(lines, at, growing, depth);
}

// The nodes of all blocks, and for each the line it starts at.
function readBlocks(lines, growing, depth = 0) {
  const nodes = [];
  const starts = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [node, next] = readBlock(lines, at, growing, depth);
    nodes.push(node);
    starts.push(at);
    at = next;
  }
  return { nodes, starts };
}

function growText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function isAlike(old, fresh) {
  if (old.nodeName !== fresh.nodeName) return false;
  if (!(old instanceof Element)) return true;
  const attributes = [...fresh.attributes];
  if (old.attributes.length !== attributes.length) return false;
  return attributes.every(({ name, value }) => old.getAttribute(name) === value);
}

// Make an old node what a fresh one is, keeping what need not change: a selection and a scrolled box survive.
function patch(old, fresh) {
  if (!isAlike(old, fresh)) {
    old.replaceWith(fresh);
    return fresh;
  }
  if (old instanceof Text) {
    growText(old, fresh.data);
    return old;
  }
  let child = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    if (child === null) old.append(wanted);
    else child = patch(child, wanted).nextSibling;
  }
  while (child !== null) {
    const next = child.nextSibling;
    child.remove();
    child = next;
  }
  return old;
}

class MarkdownView {
  constructor(parent) {
    this.parent = parent;
    this.settled = 0; // characters whose blocks can no longer change
    this.live = []; // the nodes of the blocks after them
  }

  // Show the text so far, of which the last call's is a beginning. growing: whether more will come.
  draw(text, growing) {
    const raw = text.slice(this.settled).split("\n");
    const lines = raw.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
    const { nodes, starts } = readBlocks(lines, growing);
    for (const [index, fresh] of nodes.entries()) {
      fresh.dir = fresh.localName === "figure" ? "ltr" : "auto"; // each block as its language is written
      if (index < this.live.length) {
        nodes[index] = patch(this.live[index], fresh);
      } else {
        this.parent.append(fresh);
      }
    }
    for (const node of this.live.slice(nodes.length)) node.remove();
    this.live = nodes;
    if (growing) this.settle(raw, starts);
  }

  // A block is settled once the next has begun with a whole line: the last line may still become anything.
  settle(raw, starts) {
    const begun = starts.findLastIndex((start) => start < raw.length - 1);
    if (begun <= 0) return;
    this.live = this.live.slice(begun);
    for (const line of raw.slice(0, starts[begun])) this.settled += line.length + 1;
  }
}
