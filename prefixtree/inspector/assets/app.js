// Brings the page's parts together.

const byId = (id) => document.getElementById(id);

class App {
  constructor(data) {
    this.data = data.frames; // as they came; decoded when they are shown
    this.at = -1;
    this.matchAt = -1;
    this.playing = 0;
    this.icicle = new Icicle(byId("icicle"), (item) => this.selected(item), (item) => this.hover(item));
    this.map = new BlockMap(byId("blocks"), (item) => this.icicle.select(item), (text) => { byId("block").textContent = text; });
    this.controls();
    readPalette();
    if (this.data.length) this.showFrame(this.data.length > 1 ? 0 : this.data.length - 1);
    if (data.live) this.listen();
  }

  showFrame(at) {
    this.at = at;
    this.show(decodeFrame(this.data[at]));
    byId("slider").value = at;
    byId("moment").textContent = this.frame.label || `${at + 1} of ${this.data.length}`;
  }

  show(frame) {
    this.frame = frame;
    fillPairs(byId("figures"), figures(frame));
    byId("counts").textContent = `${plural(frame.nodes, "node")}, ${frame.deepest} deep`;
    const { freeBlocks, freeExtents, largestExtent } = frame;
    byId("fragmentation").textContent = freeBlocks
      ? `${number(freeBlocks)} free in ${plural(freeExtents, "piece")}, the largest ${number(largestExtent)}: `
        + `${percent(1 - largestExtent / freeBlocks)} fragmented`
      : "none free";
    byId("query").disabled = byId("next").disabled = !frame.texts;
    byId("query").placeholder = frame.texts ? "Search text ( / )" : "No text in this page";
    byId("by-tier").hidden = byId("by-tier").disabled = !frame.tiers.length;
    this.icicle.show(frame);
    this.map.show(frame);
    this.legends();
    this.find();
    this.selected(this.icicle.selected);
  }

  legends() {
    fillLegend(byId("legend"), treeLegend(this.frame, this.icicle.mode));
    fillLegend(byId("pool-legend"), [[palette.pinned, "in use"], [palette.pending, "reserved for pending"],
      [palette.evictable, "evictable"], [palette.free, "free"], [palette.aside, "set aside"]]);
  }

  selected(item) {
    this.map.mark(item);
    fillDetail(byId("detail"), this.frame, item);
    if (item >= 0) byId("said").textContent = sentence(this.frame, item);
  }

  hover(item) {
    byId("said").textContent = sentence(this.frame, item >= 0 ? item : this.icicle.selected);
  }

  find() {
    const query = byId("query").value;
    const found = search(this.frame, query);
    this.matchAt = -1;
    this.icicle.setFound(found);
    this.icicle.draw();
    byId("matches").textContent = query ? plural(found.length, "match").replace("matchs", "matches") : "";
  }

  nextMatch() {
    const { found } = this.icicle;
    if (!found.length) return;
    this.matchAt = (this.matchAt + 1) % found.length;
    byId("matches").textContent = `${number(this.matchAt + 1)} of ${number(found.length)}`;
    this.icicle.select(found[this.matchAt]);
  }

  controls() {
    const { icicle } = this;
    byId("width").addEventListener("change", (event) => icicle.setMetric(event.target.value));
    byId("colour").addEventListener("change", (event) => {
      icicle.mode = event.target.value;
      this.legends();
      icicle.draw();
    });
    byId("zoom-in").addEventListener("click", () => icicle.zoomInOnSelected(0.5));
    byId("zoom-out").addEventListener("click", () => icicle.zoomInOnSelected(2));
    byId("zoom-reset").addEventListener("click", () => icicle.reset());
    let waiting = 0;
    byId("query").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { waiting = 0; this.find(); }, 150);
    });
    byId("search").addEventListener("submit", (event) => {
      event.preventDefault();
      if (waiting) { clearTimeout(waiting); waiting = 0; this.find(); }
      this.nextMatch();
    });
    addEventListener("keydown", (event) => {
      if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) {
        event.preventDefault();
        byId("query").focus();
      }
    });
    let resizing = 0;
    addEventListener("resize", () => {
      cancelAnimationFrame(resizing);
      resizing = requestAnimationFrame(() => { if (this.frame) { icicle.resize(); this.map.resize(); } });
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      readPalette();
      if (this.frame) { this.legends(); icicle.draw(); this.map.draw(); }
    });
    byId("time").hidden = this.data.length < 2;
    byId("slider").max = this.data.length - 1;
    byId("slider").addEventListener("input", (event) => this.showFrame(Number(event.target.value)));
    byId("play").addEventListener("click", () => this.play());
  }

  play() {
    const stop = this.playing;
    clearInterval(this.playing);
    this.playing = stop ? 0 : setInterval(() => {
      if (this.at + 1 < this.data.length) this.showFrame(this.at + 1); else this.play();
    }, 400);
    if (!stop && this.at + 1 === this.data.length) this.showFrame(0);
    byId("play").textContent = stop ? "Play" : "Pause";
    byId("play").setAttribute("aria-pressed", String(!stop));
  }

  // A live page: the server says when there is something new, and the page fetches it.
  listen() {
    const line = byId("connection");
    const say = (text, lost) => { line.textContent = text; line.classList.toggle("lost", lost); };
    line.hidden = false;
    say("connecting …", false);
    let busy = false, again = false;
    const load = async () => {
      if (busy) { again = true; return; }
      busy = true;
      try {
        const answer = await fetch("tree.json", { cache: "no-store" });
        const body = await answer.json();
        if (!answer.ok) throw new Error(body.error || answer.statusText);
        this.show(decodeFrame(body));
        say("live", false);
      } catch (error) {
        say(`no data: ${oneLine(String(error.message || error))}`, true);
      }
      busy = false;
      if (again) { again = false; load(); }
    };
    const events = new EventSource("events");
    events.addEventListener("tree", load);
    events.addEventListener("error", () => say("connection lost", true));
  }
}

const app = new App(JSON.parse(byId("data").textContent));
