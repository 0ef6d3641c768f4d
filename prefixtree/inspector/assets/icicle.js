// The tree on a canvas: a row a depth, width by the metric. Only what is at least a pixel wide is
// drawn; of narrower neighbours one line a pixel.

const ROW = 22, MOST_ROWS = 24, FONT = "12px system-ui, sans-serif";

class Icicle {
  constructor(canvas, onSelect, onHover) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onSelect = onSelect;
    this.frame = null;
    this.metric = "tokens";
    this.mode = "state";
    this.selected = -1;
    this.found = [];
    this.foundBefore = null; // running count of found items
    this.from = 0; this.to = 1; // the part of the whole width that is shown
    this.topRow = 0;
    this.drawMs = 0;
    this.waiting = 0;
    this.mostRows = 4;
    this.listen(onHover);
  }

  show(frame) {
    this.selected = this.frame ? sameItem(this.frame, this.selected, frame) : -1;
    this.frame = frame;
    this.setFound([]);
    this.resize();
  }

  setMetric(metric) { this.metric = metric; this.reset(); }

  setFound(found) {
    this.found = found;
    this.foundBefore = null;
    if (found.length) {
      this.foundBefore = new Int32Array(this.frame.count + 1);
      for (const item of found) this.foundBefore[item + 1] = 1;
      for (let i = 0; i < this.frame.count; i++) this.foundBefore[i + 1] += this.foundBefore[i];
    }
  }

  resize() {
    // Never lower than before: what is below must not jump from frame to frame.
    const rows = this.mostRows = Math.min(MOST_ROWS, Math.max(this.mostRows, this.frame.deepest + 1));
    this.height = Math.min(rows * ROW, Math.max(6 * ROW, Math.floor(innerHeight * 0.6)));
    this.canvas.style.height = this.height + 2 + "px";
    this.width = this.canvas.clientWidth;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.draw();
  }

  get rows() { return Math.floor(this.height / ROW); }

  // Once before the next picture, however often it is asked for.
  draw() { this.waiting ||= requestAnimationFrame(() => { this.waiting = 0; this.paint(); }); }

  paint() {
    const began = performance.now();
    const { context, frame, width, height } = this;
    context.clearRect(0, 0, width, height);
    context.font = FONT;
    context.textBaseline = "middle";
    const { left, total, sum } = layout(frame, this.metric);
    if (!sum) {
      context.fillStyle = palette.quiet;
      context.fillText(frame.nodes ? "All of this is 0 here: choose another width." : "The tree is empty.", 10, ROW);
      return;
    }
    const { depth, size } = frame;
    const colour = colouring(frame, this.mode);
    const scale = width / ((this.to - this.from) * sum), shift = this.from * sum;
    const lastPixel = new Int32Array(this.rows + 2).fill(-1);
    const letter = context.measureText("n").width;
    let selectedBox = null;
    for (let i = 0; i < frame.count;) {
      const x = (left[i] - shift) * scale, w = total[i] * scale, row = depth[i] - this.topRow;
      if (!w || x + w <= 0 || x >= width || row >= this.rows + 1) { i += size[i]; continue; }
      if (row < 0) { i += w < 1 ? size[i] : 1; continue; }
      const y = row * ROW;
      if (w < 1) {
        const pixel = Math.floor(x);
        if (lastPixel[row] !== pixel || this.holdsFound(i)) {
          context.fillStyle = this.holdsFound(i) ? palette.found : colour(i);
          context.fillRect(pixel, y, 1, ROW - 1);
          lastPixel[row] = pixel;
        }
        if (i === this.selected) selectedBox = [pixel - 1, y, 3];
        i += size[i];
        continue;
      }
      const begin = Math.max(x, 0), end = Math.min(x + w, width);
      context.fillStyle = colour(i);
      context.fillRect(begin, y, Math.max(end - begin - (w > 3 ? 1 : 0), 1), ROW - 1);
      if (frame.pending[i] && frame.length[i] && this.mode === "state" && this.metric === "tokens") {
        // Its own part is on the right of what is below it, and what is pending the last of that.
        const edge = Math.max(x + w * (1 - frame.pending[i] / total[i]), 0);
        context.fillStyle = palette.pending;
        context.fillRect(edge, y, Math.max(end - edge - 1, 0), ROW - 1);
      }
      if (this.foundBefore && this.isFound(i)) {
        context.fillStyle = palette.found;
        context.fillRect(begin, y + ROW - 5, Math.max(end - begin - 1, 1), 4);
      }
      if (end - begin > 30) {
        const text = this.label(i), room = Math.floor((end - begin - 8) / letter);
        context.fillStyle = palette.label;
        context.save();
        context.beginPath();
        context.rect(begin, y, end - begin - 2, ROW);
        context.clip();
        context.fillText(text.length > room ? text.slice(0, Math.max(room - 1, 1)) + "…" : text, begin + 4, y + ROW / 2);
        context.restore();
      }
      if (i === this.selected) selectedBox = [begin, y, end - begin];
      i++;
    }
    if (selectedBox) {
      context.strokeStyle = palette.select;
      context.lineWidth = 2;
      context.strokeRect(selectedBox[0] + 1, selectedBox[1] + 1, Math.max(selectedBox[2] - 3, 1), ROW - 3);
    }
    this.drawScroll();
    this.drawMs = performance.now() - began;
  }

  // How much of the depth is above and below what is shown.
  drawScroll() {
    const all = this.frame.deepest + 1;
    if (all <= this.rows) return;
    const { context, width, height } = this;
    context.fillStyle = palette.quiet;
    context.fillRect(width - 4, height * this.topRow / all, 4, Math.max(height * this.rows / all, 8));
  }

  label(item) {
    const { frame } = this, node = frame.nodeOf[item];
    if (node < 0) return namespaceName(frame.namespaces[frame.namespace[item]]);
    const tokens = number(frame.length[item] + frame.pending[item]);
    return frame.texts ? oneLine(frame.texts[node].slice(0, 300)) : tokens;
  }

  isFound(item) { return this.foundBefore[item + 1] > this.foundBefore[item]; }

  holdsFound(item) {
    return this.foundBefore && this.foundBefore[item + this.frame.size[item]] > this.foundBefore[item];
  }

  itemAt(x, y) {
    const { frame } = this, { left, total, sum } = layout(frame, this.metric);
    const at = (this.from + x / this.width * (this.to - this.from)) * sum;
    const wanted = this.topRow + Math.floor(y / ROW);
    for (let i = 0; i < frame.count;) {
      if (at < left[i] || at >= left[i] + total[i]) { i += frame.size[i]; continue; }
      if (frame.depth[i] === wanted) return i;
      i++;
    }
    return -1;
  }

  select(item, visible = true) {
    this.selected = item;
    if (visible && item >= 0) this.reveal(item);
    this.draw();
    this.onSelect(item);
  }

  // Moves the window as little as needed for the item to be at least some pixels of it.
  reveal(item) {
    const { left, total, sum } = layout(this.frame, this.metric);
    if (!sum) return;
    const begin = left[item] / sum, width = total[item] / sum, span = this.to - this.from;
    if (width && (begin >= this.to || begin + width <= this.from || width < span * 12 / this.width)) {
      const wanted = Math.min(1, Math.max(width, width < span * 12 / this.width ? 20 * width : span));
      this.window(begin + width / 2 - wanted / 2, wanted);
    }
    this.revealRow(this.frame.depth[item]);
  }

  revealRow(depth) {
    if (depth < this.topRow) this.scrollTo(depth - 1);
    if (depth >= this.topRow + this.rows) this.scrollTo(depth - this.rows + 2);
  }

  scrollTo(row) {
    this.topRow = Math.max(0, Math.min(row, this.frame.deepest + 1 - this.rows));
  }

  window(from, span) {
    const narrowest = 1e-9;
    span = Math.min(1, Math.max(span, narrowest));
    this.from = Math.min(Math.max(from, 0), 1 - span);
    this.to = this.from + span;
  }

  zoom(factor, at = 0.5) {
    const span = this.to - this.from, middle = this.from + at * span;
    this.window(middle - at * span * factor, span * factor);
    this.draw();
  }

  zoomTo(item) {
    const { left, total, sum } = layout(this.frame, this.metric);
    if (item < 0 || !total[item]) return;
    this.window(left[item] / sum, total[item] / sum);
    this.revealRow(this.frame.depth[item]);
    this.draw();
  }

  // To the narrowest node above that is wider than what is shown.
  zoomOut() {
    const { total, sum } = layout(this.frame, this.metric), span = this.to - this.from;
    let item = this.selected;
    while (item >= 0 && total[item] / sum <= span * 1.0001) item = this.frame.parent[item];
    if (item < 0) this.reset(); else this.zoomTo(item);
  }

  reset() { this.from = 0; this.to = 1; this.topRow = 0; this.draw(); }

  zoomInOnSelected(factor) {
    const { left, total, sum } = layout(this.frame, this.metric), item = this.selected;
    let at = 0.5;
    if (item >= 0 && sum) {
      const middle = (left[item] + total[item] / 2) / sum;
      at = Math.min(1, Math.max(0, (middle - this.from) / (this.to - this.from)));
    }
    this.zoom(factor, at);
  }

  sibling(item, step) {
    const { frame } = this, parent = frame.parent[item], { total } = layout(frame, this.metric);
    const first = parent < 0 ? 0 : parent + 1;
    const end = parent < 0 ? frame.count : parent + frame.size[parent];
    let before = -1;
    for (let i = first; i < end; i += frame.size[i]) {
      if (!total[i]) continue;
      if (step < 0 && i === item) return before;
      if (step > 0 && i > item) return i;
      before = i;
    }
    return -1;
  }

  child(item) {
    const { frame } = this, { total } = layout(frame, this.metric);
    let widest = -1;
    for (let i = item + 1; i < item + frame.size[item]; i += frame.size[i]) {
      if (total[i] && (widest < 0 || total[i] > total[widest])) widest = i;
    }
    return widest;
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const item = this.selected, frame = this.frame;
    const move = (next) => { if (next >= 0 && next < frame.count) this.select(next); };
    switch (event.key) {
      case "ArrowDown": move(item < 0 ? 0 : this.child(item)); break;
      case "ArrowUp": move(item < 0 ? 0 : frame.parent[item]); break;
      case "ArrowLeft": move(item < 0 ? 0 : this.sibling(item, -1)); break;
      case "ArrowRight": move(item < 0 ? 0 : this.sibling(item, 1)); break;
      case "Home": move(0); break;
      case "Enter": this.zoomTo(item); break;
      case "Backspace": case "Escape": this.zoomOut(); break;
      case "+": case "=": this.zoomInOnSelected(0.5); break;
      case "-": this.zoomInOnSelected(2); break;
      case "0": this.reset(); break;
      case "PageDown": this.scrollTo(this.topRow + this.rows - 1); this.draw(); break;
      case "PageUp": this.scrollTo(this.topRow - this.rows + 1); this.draw(); break;
      default: return;
    }
    event.preventDefault();
  }

  listen(onHover) {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left - 1, event.clientY - box.top - 1];
    };
    let grabbed = null, dragged = false;
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("pointerdown", (event) => {
      grabbed = { at: place(event), from: this.from, row: this.topRow };
      dragged = false;
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (!grabbed) { onHover(this.itemAt(x, y)); return; }
      const dx = x - grabbed.at[0], dy = y - grabbed.at[1];
      if (!dragged && Math.abs(dx) + Math.abs(dy) < 5) return;
      if (!dragged) canvas.setPointerCapture(event.pointerId);
      dragged = true;
      const span = this.to - this.from;
      this.window(grabbed.from - dx / this.width * span, span);
      this.scrollTo(grabbed.row - Math.round(dy / ROW));
      this.draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (grabbed && !dragged) this.select(this.itemAt(...place(event)), false);
      grabbed = null;
    });
    canvas.addEventListener("pointercancel", () => { grabbed = null; });
    canvas.addEventListener("pointerleave", () => onHover(-1));
    canvas.addEventListener("dblclick", (event) => this.zoomTo(this.itemAt(...place(event))));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.shiftKey) { this.scrollTo(this.topRow + Math.sign(event.deltaY)); this.draw(); return; }
      const step = Math.max(-1, Math.min(1, event.deltaY / 100));
      this.zoom(1.5 ** step, place(event)[0] / this.width);
    }, { passive: false });
  }
}
