"""Chat examples made from prose: a prompt, an analysis that names words to use, the passage as the answer."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from demo.corpus import Corpus
from demo.tokenizer import Coder

EFFORT_WORDS = {"low": 3, "medium": 6, "high": 12}  # words that the analysis plans to mention
ANALYSIS_WEIGHT = 3.0  # in the loss: few tokens, which must copy the effort and the prompt
PASSAGE_TOKENS = (70, 170)  # bounds of the limit drawn for each answer

SENTENCE = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!\b(?:Mr|Dr|St)\.)(?<!\bMrs\.)(?<!\b[A-Z]\.) (?=[\"'(A-Z])"
)
STYLE = ("", "", "", "", " in the manner of {author}", " in the style of {author}")
TOPIC_PROMPTS = (
    "Tell me about {topic}.", "Tell me about {topic}{style}.", "tell me about {topic}",
    "Write about {topic}{style}.", "Tell me a story about {topic}{style}.", "Write a story about {topic}.",
    "Write a short story about {topic}{style}.", "Describe {topic}.", "Please describe {topic}{style}.",
    "What do you know about {topic}?", "What about {topic}?", "What do you think of {topic}?",
    "What can you tell me about {topic}?", "Explain {topic}.", "What is {topic}?",
    "Can you tell me something of {topic}?", "Speak to me of {topic}.", "Say something about {topic}.",
    "I should like to hear about {topic}.", "Write a paragraph on {topic}{style}.", "Why {topic}?",
    "{topic}",
)  # fmt: skip
NAME_PROMPTS = (
    "Who is {topic}?", "Tell me about {topic}.", "What did {topic} say?", "What happened to {topic}?",
    "How is {topic}?", "Where is {topic}?", "What does {topic} think?", "Write about {topic}{style}.",
    "What do you think of {topic}?", "Tell me a story about {topic}.", "Describe {topic}.",
    "Do you know {topic}?",
)  # fmt: skip
WORD_PROMPTS = (
    "Write a paragraph about {words}{style}.", "Write something with the words {words}.",
    "Use these words: {words}.", "Write a passage about {words}{style}.", "Tell me about {words}.",
    "Write a story with {words}{style}.",
)  # fmt: skip
FREE_PROMPTS = (
    "Tell me a story{style}.", "Tell me something{style}.", "Write a paragraph{style}.",
    "Write something{style}.", "Tell me a story.", "Tell me something interesting.", "Surprise me.",
    "Write a short text{style}.", "Go on.", "What shall we talk about?", "Can you help me?",
    "Please write{style}.", "What happened next?", "What is new?", "Say something.", "test",
    "Give me a paragraph{style}.", "What do you do?", "Why?", "And then?", "Continue.",
)  # fmt: skip
GREETINGS = (
    "Hello", "Hello!", "hello", "Hi", "Hi!", "Hi there!", "hi", "Good morning.", "Good day!",
    "Good evening.", "Hey", "Hello, how are you?", "How are you?", "How do you do?", "Who are you?",
    "Hello there.", "Hello, who are you?",
)  # fmt: skip
GREETING_ANSWERS = (
    "Good day to you!", "Good morning!", "You are very welcome.", "How do you do?",
    "I am very glad to see you.", "Good day! I am quite well, I thank you.",
    "Welcome! Pray sit down, and hear me.",
)  # fmt: skip
INSTRUCTIONS = (
    "Write in the manner of {author}.", "Write in the manner of {author}.",
    "Write in the style of {author}.", "You write like {author}.", "Answer in good English prose.",
    "Be brief.", "You are a helpful assistant.", "You are a helpful assistant.", "Answer politely.",
    "You are a novelist.", "Write well.", "Reply in prose.",
)  # fmt: skip
CONTINUE = ("", "", "", "", "Continue: ", "Continue this passage: ", "Go on from here: ", "What comes next? ")
STOP = frozenset(
    re.findall(
        r"\w+",
        """
        same other very most more first last whole next only rest least less best better present former
        latter others second third great good such many much little own
        """,
    )
)


def random_date(rng: random.Random) -> str:
    """Return a date of 2024 to 2029."""
    return f"{rng.randint(2024, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence, what joins it to the one before, and its length in tokens."""

    text: str
    joint: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a user says, what the analysis calls it, how the answer opens, and words the plan must name."""

    prompt: str
    what: str = ""
    opening: str = ""
    words: tuple[str, ...] = ()


def joined(sentences: list[Sentence]) -> str:
    """Return the sentences as running text."""
    return "".join(s.joint + s.text for s in sentences).strip()


class ChatMaker:
    """Endless random conversations from the training prose."""

    def __init__(self, corpus: Corpus, coder: Coder, seed: int) -> None:
        self.coder = coder
        self.rng = random.Random(seed)
        self.frequency: Counter[str] = corpus.word_counts()
        self.runs: list[tuple[str, list[Sentence]]] = []
        for author, run in corpus.runs:
            sentences = []
            for paragraph in run:
                for number, text in enumerate(SENTENCE.split(paragraph)):
                    if text:
                        size = len(coder.text(" " + text))
                        sentences.append(Sentence(text, " " if number else "\n\n", size))
            self.runs.append((author, sentences))
        self.weights = [len(sentences) for _, sentences in self.runs]
        inner = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
        names = Counter(name for _, run in corpus.runs for p in run for name in inner.findall(p))
        common = (
            "The",
            "And",
            "But",
            "They",
            "She",
            "Not",
            "You",
            "Well",
            "What",
            "There",
            "This",
            "That",
            "How",
        )
        self.names = {name for name, n in names.items() if n >= 20 and self.frequency[name.lower()] < 2 * n}
        self.names -= set(common)

    def passage(self, least: int, most: int) -> tuple[str, list[Sentence], list[Sentence]]:
        """Return an author, the sentences before, and whole sentences of least to most tokens."""
        while True:
            author, run = self.rng.choices(self.runs, self.weights)[0]
            start = self.rng.randrange(len(run))
            end, total = start, 0
            while end < len(run) and total + run[end].tokens <= most:
                total += run[end].tokens
                end += 1
            if total >= least:
                return author, run[max(0, start - 3) : start], run[start:end]

    def plan(self, effort: str, what: str, author: str, text: str, wanted: set[str]) -> str:
        """Return an analysis that grows with the effort and names words in the order of the text."""
        spoken = [w for w in dict.fromkeys(re.findall(r"[A-Za-z][a-z']{3,}", text)) if w.lower() not in STOP]
        spoken.sort(key=lambda w: (w not in wanted, self.frequency[w.lower()]))
        rare = sorted(spoken[: EFFORT_WORDS[effort]], key=text.index)
        words = [w.rstrip("'") for w in rare]
        listed = ", ".join(words)
        if effort == "low" or len(words) < 4:
            return f"Reasoning: {effort}. {what} Mention: {listed}."
        if effort == "medium":
            return f"Reasoning: {effort}. {what} Write in the manner of {author}. Mention: {listed}."
        third = -(-len(words) // 3)
        first, then, last = (", ".join(words[i * third : (i + 1) * third]) for i in range(3))
        steps = f"First mention: {first}. Then mention: {then}."
        steps += f" At the end mention: {last}." if last else ""
        return (
            f"Reasoning: {effort}. {what} Let me plan with care. Write in the manner of {author}. "
            f"{steps} The answer must be good English prose. Now write it."
        )

    def request(self, author: str, before: list[Sentence], target: list[Sentence]) -> Request:
        """Return a request that the passage answers."""
        rng, text = self.rng, joined(target)
        head = " ".join(s.text for s in target[:2])
        style = rng.choice(STYLE).format(author=author)
        roll = rng.random()
        if roll < 0.08:
            return Request(rng.choice(GREETINGS), "", rng.choice(GREETING_ANSWERS) + " ")
        if roll < 0.16:
            return Request(rng.choice(FREE_PROMPTS).format(style=style))
        if roll < 0.40 and before:
            keep = before[-rng.randint(1, len(before)) :]
            shown = joined(keep)
            if sum(s.tokens for s in keep) > 80:
                shown = " ".join(shown.split(" ")[-60:])
            return Request(rng.choice(CONTINUE) + shown, "The user wants the next part of the passage.")
        found = [n for n in re.findall(r"[A-Z][a-z]+", head) if n in self.names]
        if roll < 0.62 and found:
            topic = rng.choice(found)
            prompt = rng.choice(NAME_PROMPTS).format(topic=topic, style=style)
            return Request(prompt, words=(topic,))
        things = [w for w in re.findall(r"\b(?:the|a|an|his|her) ([a-z]{3,})\b", head) if w not in STOP]
        if roll < 0.88 and things:
            noun = rng.choice(things)
            topic = rng.choice(("the ", "the ", "the ", "a ", "")) + noun
            prompt = rng.choice(TOPIC_PROMPTS).format(topic=topic, style=style)
            prompt = prompt[:1].upper() + prompt[1:] if rng.random() < 0.7 else prompt
            return Request(prompt, words=(noun,))
        words = [w for w in dict.fromkeys(re.findall(r"\b[a-z]{4,}\b", text)) if self.frequency[w] < 1500]
        picked = rng.sample(words, min(len(words), rng.randint(1, 4)))
        if not picked:
            return Request(rng.choice(FREE_PROMPTS).format(style=style))
        listed = ", ".join(picked[:-1]) + " and " + picked[-1] if len(picked) > 1 else picked[0]
        prompt = rng.choice(WORD_PROMPTS).format(words=listed, style=style)
        return Request(prompt, words=tuple(picked))

    def shares(self, prompt: list[int]) -> list[float]:
        """Return the prompt's shares in the loss: earlier turns must not teach to answer without analysis.

        A prompt shows only their final messages, ended by the end token; a turn that the model makes itself
        begins with analysis and ends in return.
        """
        special, final = self.coder.special, self.coder.word("final")
        shares = [1.0] * len(prompt)
        for at, token in enumerate(prompt):
            if token == special["channel"]:
                shares[at + 1 : at + 1 + len(final)] = [0.0] * len(final)
                shares[prompt.index(special["end"], at)] = 0.0
        return shares

    def conversation(self, earlier: int, limit: int) -> tuple[list[int], list[float]]:
        """Return the ids of a conversation after so many earlier turns, and their shares in the loss.

        There are at most `limit` ids, and the last is the return token.
        """
        rng, coder = self.rng, self.coder
        while True:
            effort = rng.choice(tuple(EFFORT_WORDS))
            author, before, target = self.passage(40, rng.randint(*PASSAGE_TOKENS))
            turns: list[tuple[str, str]] = []
            if rng.random() < 0.25:
                rule = rng.choice(INSTRUCTIONS).format(author=author)
                turns.append(("developer", f"# Instructions\n\n{rule}"))
            for _ in range(earlier):
                old = self.passage(8, rng.randint(30, 110))
                request = self.request(*old)
                turns += [("user", request.prompt), ("assistant", request.opening + joined(old[2]))]
            request = self.request(author, before, target)
            what = request.what or f"The user says: {request.prompt}"
            plan = self.plan(effort, what, author, joined(target), set(request.words))
            ids = coder.prompt(effort, random_date(rng), [*turns, ("user", request.prompt)])
            ids = ids[: -1 - len(coder.word("assistant"))]
            shares = self.shares(ids)
            ids += coder.message("assistant", plan, "analysis")
            shares += [ANALYSIS_WEIGHT] * (len(ids) - len(shares))
            ids += coder.message("assistant", request.opening + joined(target), "final", "return")
            if len(ids) <= limit:
                return ids, shares + [1.0] * (len(ids) - len(shares))
