// A frame of the page's data as typed arrays over *items*: the R roots and N nodes in depth-first
// order, each root in front of its namespace's nodes. Item i and all below it are i .. i + size[i].

function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Int32Array(bytes.buffer);
}

function decodeFrame(data) {
  const given = {};
  for (const name in data.arrays) given[name] = unpack(data.arrays[name]);
  const roots = data.namespaces.length, nodes = given.parent.length, count = roots + nodes;
  const frame = {
    label: data.label, stats: data.stats, namespaces: data.namespaces, tiers: data.tiers, nodes, count,
    rootItem: new Int32Array(roots).fill(-1), nodeOf: new Int32Array(count).fill(-1),
    itemOf: new Int32Array(nodes),
    blocks: given.blocks, aside: given.aside, texts: null, lower: null, joint: "",
    totals: new Map(),
  };
  const ints = ["parent", "size", "depth", "namespace", "length", "pending", "start", "offset",
    "pins", "hits", "idle", "age", "writer", "held", "firstBlock"];
  for (const name of ints) frame[name] = new Int32Array(count);

  const top = new Int32Array(nodes); // the namespace that each node is in
  let item = 0, opened = 0;
  const openUpTo = (namespace) => {
    for (; opened <= namespace; opened++, item++) {
      frame.rootItem[opened] = item;
      frame.parent[item] = -1;
      frame.namespace[item] = opened;
    }
  };
  let block = 0;
  for (let node = 0; node < nodes; node++) {
    const above = given.parent[node];
    top[node] = above < 0 ? ~above : top[above];
    openUpTo(top[node]);
    frame.itemOf[node] = item;
    frame.nodeOf[item] = node;
    const parent = above < 0 ? frame.rootItem[~above] : frame.itemOf[above];
    frame.parent[item] = parent;
    frame.namespace[item] = top[node];
    frame.depth[item] = frame.depth[parent] + 1;
    frame.start[item] = frame.start[parent] + frame.length[parent];
    frame.length[item] = given.length[node];
    frame.firstBlock[item] = block;
    block += given.held[node];
    item++;
  }
  openUpTo(roots - 1);
  for (const name of ["pending", "offset", "pins", "hits", "idle", "age", "writer", "held"]) {
    const from = given[name], to = frame[name], { itemOf } = frame;
    for (let node = 0; node < nodes; node++) to[itemOf[node]] = from[node];
  }
  frame.tier = new Int32Array(count).fill(-1); // also of roots
  given.tier?.forEach((tier, node) => { frame.tier[frame.itemOf[node]] = tier; });
  frame.size.fill(1);
  for (let i = count - 1; i >= 0; i--) if (frame.parent[i] >= 0) frame.size[frame.parent[i]] += frame.size[i];
  frame.deepest = frame.depth.reduce((most, depth) => Math.max(most, depth), 0);
  if (data.texts) { frame.texts = data.texts; frame.joint = data.joint; }
  countBlocks(frame);
  return frame;
}

const FREE = 0, EVICTABLE = 1, PINNED = 2, PENDING = 3, ASIDE = 4;

// What each block is for, who holds it topmost, how often it is referenced, and the free extents.
function countBlocks(frame) {
  const total = frame.stats.num_blocks, size = frame.stats.block_size;
  frame.use = new Uint8Array(total);
  frame.refs = new Int32Array(total);
  frame.owner = new Int32Array(total).fill(-1);
  for (const block of frame.aside) { frame.use[block] = ASIDE; frame.refs[block]++; }
  for (let i = 0; i < frame.count; i++) {
    const written = frame.offset[i] + frame.length[i];
    for (let k = 0; k < frame.held[i]; k++) {
      const block = frame.blocks[frame.firstBlock[i] + k];
      const use = !frame.pins[i] ? EVICTABLE : k * size < written ? PINNED : PENDING;
      frame.refs[block]++;
      if (frame.owner[block] < 0) frame.owner[block] = i;
      if (frame.use[block] === FREE || use === PINNED) frame.use[block] = use;
    }
  }
  frame.freeBlocks = frame.freeExtents = frame.largestExtent = 0;
  for (let block = 0, run = 0; block < total; block++) {
    if (frame.use[block]) { run = 0; continue; }
    frame.freeBlocks++;
    if (!run++) frame.freeExtents++;
    frame.largestExtent = Math.max(frame.largestExtent, run);
  }
}

// Left edges and widths of all items, in units of the metric: an item's own part and those of all
// below it, children from the left.
function layout(frame, metric) {
  if (frame.totals.has(metric)) return frame.totals.get(metric);
  const { count, parent } = frame;
  const total = new Float64Array(count), left = new Float64Array(count);
  for (let i = count - 1; i >= 0; i--) {
    total[i] += metric === "tokens" ? frame.length[i] + frame.pending[i] : metric === "blocks"
      ? frame.held[i] : frame[metric][i];
    if (parent[i] >= 0) total[parent[i]] += total[i];
  }
  const used = new Float64Array(count);
  let sum = 0;
  for (let i = 0; i < count; i++) {
    if (parent[i] < 0) { left[i] = sum; sum += total[i]; } else {
      left[i] = left[parent[i]] + used[parent[i]];
      used[parent[i]] += total[i];
    }
  }
  const result = { left, total, sum };
  frame.totals.set(metric, result);
  return result;
}

// The items in whose text the query begins, ascending; it may end in one below. Nothing where there
// is no text.
function search(frame, query) {
  if (!frame.texts || !query) return [];
  frame.lower ||= frame.texts.map((text) => text.toLowerCase());
  const { lower, joint, itemOf, nodeOf } = frame;
  const wanted = query.toLowerCase(), room = wanted.length - 1, kept = room + joint.length;
  const hit = new Uint8Array(frame.count);
  const ends = new Array(frame.nodes); // as many characters in front of what is below as matter
  for (let node = 0; node < frame.nodes; node++) {
    const item = itemOf[node], above = nodeOf[frame.parent[item]], text = lower[node];
    if (text.includes(wanted)) hit[item] = 1;
    if (!room) continue;
    const before = above < 0 ? "" : ends[above];
    if (before) {
      const across = before + text.slice(0, room);
      for (let at = across.indexOf(wanted); at >= 0; at = across.indexOf(wanted, at + 1)) {
        let from = above, back = before.length - at;
        while (back > lower[from].length + joint.length) {
          back -= lower[from].length + joint.length;
          from = nodeOf[frame.parent[itemOf[from]]];
        }
        hit[itemOf[from]] = 1;
      }
    }
    if (frame.size[item] > 1) ends[node] = (before + text.slice(-room) + joint).slice(-kept);
  }
  const found = [];
  for (let item = 0; item < frame.count; item++) if (hit[item]) found.push(item);
  return found;
}

// The item of another frame that is the same node, or the lowest one above it that is still there;
// -1 when its namespace has gone. Numbers differ from frame to frame, but not where a node's KV is.
function sameItem(from, item, to) {
  if (item < 0) return -1;
  const path = [];
  for (let i = item; from.parent[i] >= 0; i = from.parent[i]) path.push(i);
  const wanted = from.namespaces[from.namespace[item]];
  let at = to.rootItem[to.namespaces.indexOf(wanted)];
  if (at === undefined) return -1;
  for (const step of path.reverse()) {
    let next = -1;
    for (let child = at + 1; child < at + to.size[at]; child += to.size[child]) {
      if (to.blocks[to.firstBlock[child]] === from.blocks[from.firstBlock[step]]
        && to.offset[child] === from.offset[step] && to.held[child]) { next = child; break; }
    }
    if (next < 0) return at;
    at = next;
  }
  return at;
}
