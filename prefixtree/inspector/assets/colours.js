// Colours come from the style sheet, so that light and dark are decided in one place.

const STATES = [["pinned", "in use (pinned)"], ["pending", "pending"], ["evictable", "evictable"]];
// Colours that stand for names: the list that these are in, and how one is shown.
const NAMED = { namespace: ["namespaces", namespaceName], tier: ["tiers", tierName] };
const USES = ["free", "evictable", "pinned", "pending", "aside"];

let palette = {};

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = { dark: matchMedia("(prefers-color-scheme: dark)").matches };
  for (const name of ["page", "ink", "quiet", "line", "sunk", "accent", "select", "found", "root",
    "pinned", "pending", "evictable", "free", "aside", "label"]) {
    palette[name] = style.getPropertyValue("--" + name).trim();
  }
  const light = palette.dark ? 36 : 74;
  palette.names = Array.from({ length: 12 }, (_, i) => `hsl(${(i * 137.5 + 210) % 360} 45% ${light}%)`);
  // From little to much, in 16 steps.
  palette.heat = Array.from({ length: 16 }, (_, i) => (palette.dark
    ? `hsl(${220 - 12 * i} 50% ${27 + 0.3 * i}%)` : `hsl(${220 - 12 * i} 70% ${88 - 1.6 * i}%)`));
}

function stateOf(frame, item) {
  if (frame.pending[item] && !frame.length[item]) return "pending";
  return frame.pins[item] ? "pinned" : "evictable";
}

// A function from item to colour.
function colouring(frame, mode) {
  const { parent } = frame;
  if (mode in NAMED) {
    const at = frame[mode];
    return (i) => (at[i] < 0 ? palette.root : palette.names[at[i] % palette.names.length]);
  }
  if (mode === "state") return (i) => (parent[i] < 0 ? palette.root : palette[stateOf(frame, i)]);
  const values = frame[mode];
  const most = Math.log1p(values.reduce((a, b) => Math.max(a, b), 1));
  return (i) => (parent[i] < 0 ? palette.root
    : palette.heat[Math.min(15, Math.floor(15.999 * Math.log1p(values[i]) / most))]);
}

function fillLegend(list, entries) {
  list.replaceChildren(...entries.map(([colour, text]) => {
    const entry = document.createElement("li"), swatch = document.createElement("i");
    swatch.style.background = colour;
    entry.append(swatch, text);
    return entry;
  }));
}

function treeLegend(frame, mode) {
  if (mode === "state") return STATES.map(([name, text]) => [palette[name], text]);
  if (mode in NAMED) {
    const [list, shownAs] = NAMED[mode];
    const shown = frame[list].slice(0, 8).map((name, i) => [palette.names[i], shownAs(name)]);
    const more = frame[list].length - shown.length;
    return more > 0 ? [...shown, ["transparent", `${number(more)} more`]] : shown;
  }
  const [least, most] = mode === "hits" ? ["never hit", "most hits"] : ["used last", "longest idle"];
  return [[palette.heat[0], least], [palette.heat[5], ""], [palette.heat[10], ""], [palette.heat[15], most]];
}
