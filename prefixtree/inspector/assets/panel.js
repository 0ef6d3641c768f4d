// What is known of one node, and of the whole cache.

function fillPairs(list, pairs) {
  list.replaceChildren(...pairs.map(([name, value]) => {
    const pair = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    pair.append(dt, dd);
    return pair;
  }));
}

function figures(frame) {
  const { stats } = frame, used = stats.num_blocks - stats.free_blocks;
  return [
    ["nodes", number(stats.nodes)],
    ["cached tokens", number(stats.cached_tokens)],
    ["in use", number(stats.pinned_tokens)],
    ["evictable", number(stats.evictable_tokens)],
    ["sequences", number(stats.open_sequences)],
    ["hit rate", percent(stats.hit_rate)],
    ["blocks", `${number(used)} of ${number(stats.num_blocks)}`],
  ];
}

// "0-3, 7, 9-12", at most so many pieces.
function runs(numbers, most = 24) {
  const pieces = [];
  for (let i = 0; i < numbers.length;) {
    let end = i;
    while (end + 1 < numbers.length && numbers[end + 1] === numbers[end] + 1) end++;
    if (pieces.length === most) return pieces.join(", ") + `, … (${number(numbers.length)} in all)`;
    pieces.push(end > i ? `${numbers[i]}–${numbers[end]}` : `${numbers[i]}`);
    i = end + 1;
  }
  return pieces.join(", ");
}

function fillDetail(box, frame, item) {
  box.replaceChildren();
  if (item < 0) {
    const hint = document.createElement("p");
    hint.textContent = "None is selected.";
    box.append(hint);
    return;
  }
  const node = frame.nodeOf[item], end = item + frame.size[item];
  let tokens = 0, blocks = 0, users = [];
  for (let i = item; i < end; i++) {
    tokens += frame.length[i] + frame.pending[i];
    blocks += frame.held[i];
    if (frame.writer[i]) users.push(frame.writer[i]);
  }
  users.sort((a, b) => a - b);
  const below = [["nodes below", number(frame.size[item] - 1)], ["tokens, all", number(tokens)]];
  const list = document.createElement("dl");
  let pairs;
  if (node < 0) {
    pairs = [["root of", namespaceName(frame.namespaces[frame.namespace[item]])], ...below];
  } else {
    const held = Array.from({ length: frame.held[item] }, (_, k) => frame.blocks[frame.firstBlock[item] + k]);
    const refs = held.map((block) => frame.refs[block]);
    pairs = [
      ["tokens", number(frame.length[item])],
      ["pending", number(frame.pending[item])],
      ["positions", `${number(frame.start[item])} to ${number(frame.start[item] + frame.length[item] + frame.pending[item] - 1)}`],
      ["state", stateOf(frame, item) + (frame.writer[item] ? `, tail of sequence ${frame.writer[item]}` : "")],
      ["pins", number(frame.pins[item])],
      ["users", users.length ? runs(users) : "none"],
      ["hits", number(frame.hits[item])],
      ["idle", frame.pins[item] ? "in use" : `for ${plural(frame.idle[item], "use")} of others`],
      ["age", `${plural(frame.age[item], "node")} made since`],
      ["depth", number(frame.depth[item])],
      ["namespace", namespaceName(frame.namespaces[frame.namespace[item]])],
      ...(frame.tiers.length ? [["tier", tierName(frame.tiers[frame.tier[item]])]] : []),
      ["blocks", held.length ? runs(held) : "none"],
      ["first offset", number(frame.offset[item])],
      ["references", refs.length ? (Math.max(...new Set(refs)) > 1 ? refs.slice(0, 24).join(" ") : "1 each") : "none"],
      ...below,
    ];
  }
  fillPairs(list, pairs);
  for (const pair of list.children) pair.style.display = "contents";
  box.append(list);
  if (node >= 0 && frame.texts) {
    const text = document.createElement("pre");
    text.id = "text";
    text.tabIndex = 0;
    text.textContent = manyLines(frame.texts[node]);
    box.append(text);
  }
}

function sentence(frame, item) {
  if (item < 0) return "";
  const node = frame.nodeOf[item];
  if (node < 0) return `${namespaceName(frame.namespaces[frame.namespace[item]])}: ${plural(frame.size[item] - 1, "node")}`;
  const tier = frame.tiers.length ? `tier ${tierName(frame.tiers[frame.tier[item]])}, ` : "";
  const text = frame.texts ? ": " + oneLine(frame.texts[node].slice(0, 80)) : "";
  return `${plural(frame.length[item] + frame.pending[item], "token")}, ${stateOf(frame, item)}, `
    + `${tier}${plural(frame.hits[item], "hit")}, depth ${frame.depth[item]}${text}`;
}
