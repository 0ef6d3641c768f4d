// The pool as a map of blocks, in the order of their numbers: what is free, and in how many pieces.

const LARGEST_CELL = 14, SMALLEST_CELL = 3, MAP_HEIGHT = 168;

class BlockMap {
  constructor(canvas, onSelect, onSay) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onSelect = onSelect;
    this.onSay = onSay;
    this.frame = null;
    this.marked = new Set(); // cells with a block of the selected node
    this.cursor = -1; // a cell
    this.waiting = 0;
    this.listen();
  }

  show(frame) { this.frame = frame; this.cursor = -1; this.marked.clear(); this.resize(); }

  resize() {
    const total = this.frame.stats.num_blocks;
    this.width = this.canvas.clientWidth;
    let cell = LARGEST_CELL;
    const fits = (size) => Math.floor(this.width / size) * Math.floor(MAP_HEIGHT / size) >= total;
    while (cell > SMALLEST_CELL && !fits(cell)) cell--;
    this.cell = cell;
    this.columns = Math.max(1, Math.floor(this.width / cell));
    const cells = Math.floor(MAP_HEIGHT / cell) * this.columns;
    this.each = Math.max(1, Math.ceil(total / cells)); // blocks a cell
    this.cells = Math.ceil(total / this.each);
    this.height = Math.ceil(this.cells / this.columns) * cell;
    this.canvas.style.height = this.height + 2 + "px";
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.draw();
  }

  mark(item) {
    this.marked.clear();
    if (item >= 0) {
      const first = this.frame.firstBlock[item];
      for (let k = 0; k < this.frame.held[item]; k++) {
        this.marked.add(Math.floor(this.frame.blocks[first + k] / this.each));
      }
    }
    this.draw();
  }

  // Once before the next picture, however often it is asked for.
  draw() { this.waiting ||= requestAnimationFrame(() => { this.waiting = 0; this.paint(); }); }

  paint() {
    const { context, frame, cell, columns } = this;
    context.clearRect(0, 0, this.width, this.height);
    const gap = cell > 5 ? 1 : 0, counts = new Int32Array(USES.length);
    for (let c = 0; c < this.cells; c++) {
      const x = c % columns * cell, y = Math.floor(c / columns) * cell;
      counts.fill(0);
      const end = Math.min((c + 1) * this.each, frame.use.length);
      for (let block = c * this.each; block < end; block++) counts[frame.use[block]]++;
      // From above: one stripe for each use, as high as its part of the cell's blocks.
      let from = 0;
      for (let use = counts.length - 1; use >= 0; use--) {
        if (!counts[use]) continue;
        const high = counts[use] / (end - c * this.each) * (cell - gap);
        context.fillStyle = palette[USES[use]];
        context.fillRect(x, y + from, cell - gap, high);
        from += high;
      }
      if (this.marked.has(c) || c === this.cursor) {
        context.strokeStyle = c === this.cursor ? palette.accent : palette.select;
        context.lineWidth = cell > 5 ? 2 : 1;
        const inset = context.lineWidth / 2;
        context.strokeRect(x + inset, y + inset, cell - gap - 2 * inset, cell - gap - 2 * inset);
      }
    }
  }

  say(c) {
    if (c < 0 || c >= this.cells) { this.onSay(""); return; }
    const { frame } = this, block = c * this.each;
    if (this.each > 1) {
      const end = Math.min(block + this.each, frame.use.length) - 1;
      this.onSay(`Blocks ${number(block)} to ${number(end)}`);
      return;
    }
    const use = USES[frame.use[block]];
    const refs = use === "free" ? "" : `, ${plural(frame.refs[block], "reference")}`;
    this.onSay(`Block ${number(block)}: ${use}${refs}`);
  }

  pick(c) {
    for (let block = c * this.each; block < Math.min((c + 1) * this.each, this.frame.owner.length); block++) {
      if (this.frame.owner[block] >= 0) { this.onSelect(this.frame.owner[block]); return; }
    }
  }

  listen() {
    const { canvas } = this;
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - 1) / this.cell);
      const row = Math.floor((event.clientY - box.top - 1) / this.cell);
      return column >= 0 && column < this.columns && row >= 0 ? row * this.columns + column : -1;
    };
    canvas.addEventListener("pointermove", (event) => this.say(cellAt(event)));
    canvas.addEventListener("click", (event) => {
      const c = cellAt(event);
      if (c < 0 || c >= this.cells) return;
      this.cursor = c;
      this.pick(c);
      this.draw();
      this.say(c);
    });
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
      if (event.key in steps) {
        const next = this.cursor < 0 ? 0 : this.cursor + steps[event.key];
        if (next >= 0 && next < this.cells) this.cursor = next;
      } else if (event.key === "Enter" && this.cursor >= 0) this.pick(this.cursor);
      else return;
      event.preventDefault();
      this.draw();
      this.say(this.cursor);
    });
  }
}
