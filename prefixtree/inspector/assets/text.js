// Text of unknown origin, made safe to look at: what would be invisible, or turn the line around,
// is written as an escape. It is only ever put into the page as text.

const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]/gu;

const escaped = (char) => {
  const code = char.codePointAt(0);
  return code === 10 ? "\\n" : code === 9 ? "\\t" : code < 256
    ? "\\x" + code.toString(16).padStart(2, "0") : "\\u{" + code.toString(16) + "}";
};

const oneLine = (text) => text.replace(UNSEEN, escaped);

const manyLines = (text) => text.replace(UNSEEN, (char) => (char === "\n" ? "\n" : escaped(char)));

const number = new Intl.NumberFormat("en").format;

const plural = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;

const percent = (part) => `${(100 * part).toFixed(1)}%`;

const namespaceName = (name) => (name === "" ? "default namespace" : oneLine(name));

const tierName = (name) => (name === "" ? "none" : oneLine(name));
