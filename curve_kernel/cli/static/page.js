// What a kernel prints is text here (textContent), or in a frame of another origin that runs no script
// of it. A frame says how high it is, and nothing else is taken from it.
"use strict";

const cells = document.getElementById("cells");
const status = document.getElementById("status");
const newest = document.getElementById("newest");
const MAX_HEIGHT = 2400;
let follow = true;
let told = "connecting";

function setFollow(value) {
  follow = value;
  newest.setAttribute("aria-pressed", String(value));
}

function toNewest() {
  if (follow) window.scrollTo(0, document.documentElement.scrollHeight);
}

function atBottom() {
  return window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function article(item) {
  let made = document.getElementById("item" + item.key);
  if (made) return made;
  made = element("article");
  made.id = "item" + item.key;
  made.tabIndex = -1;
  const after = [...cells.children].find((other) => Number(other.id.slice(4)) > item.key);
  cells.insertBefore(made, after || null);
  return made;
}

function show(item) {
  const made = article(item);
  if (item.note) {
    made.className = "note";
    made.textContent = item.note;
    return;
  }
  made.className = item.busy ? "busy" : "";
  let heading = made.querySelector("h2");
  if (!heading) {
    heading = element("h2");
    made.append(heading, element("div", "frames"));
  }
  heading.replaceChildren(element("span", "", item.label + " "), element("span", "who", item.who));
  made.setAttribute("aria-label", item.label + (item.busy ? ", running" : ""));
  frame(made.querySelector(".frames"), item);
}

function frame(frames, item) {
  let next = frames.querySelector("iframe.next");
  if (!next) {
    next = document.createElement("iframe");
    next.setAttribute("sandbox", "allow-scripts");
    next.referrerPolicy = "no-referrer";
    next.className = frames.firstChild ? "next" : "";
    next.addEventListener("load", () => {
      if (!next.classList.contains("next")) return;
      for (const old of [...frames.children]) if (old !== next) old.remove();
      next.className = "";
    });
  }
  next.title = item.label;
  next.src = item.url;
  if (!next.parentNode) frames.append(next);
}

window.addEventListener("message", (event) => {
  const height = event.data && event.data.height;
  if (typeof height !== "number" || !(height >= 0)) return;
  for (const one of document.querySelectorAll("iframe")) {
    if (one.contentWindow === event.source) {
      one.style.height = Math.min(Math.ceil(height) + 2, MAX_HEIGHT) + "px";
      toNewest();
    }
  }
});

function take(change) {
  document.getElementById("name").textContent = "Watching " + change.name;
  document.title = "Watching " + change.name;
  for (const old of [...cells.children]) if (Number(old.id.slice(4)) < change.first) old.remove();
  for (const item of change.items) show(item);
  document.getElementById("empty").hidden = cells.children.length > 0;
  told = change.status;
  tell(told);
  toNewest();
}

function tell(text) {
  status.textContent = text;
  status.className = text.includes("is busy") ? "busy" : "";
}

const token = new URLSearchParams(location.search).get("token");
const events = new EventSource("/events?token=" + encodeURIComponent(token));
events.onmessage = (event) => take(JSON.parse(event.data));
events.onopen = () => tell(told);
events.onerror = () => tell("not connected: the watch has ended, or the network is down");

newest.addEventListener("click", () => { setFollow(!follow); toNewest(); });
window.addEventListener("scroll", () => { if (atBottom()) setFollow(true); });
window.addEventListener("wheel", (event) => { if (event.deltaY < 0) setFollow(false); });
window.addEventListener("touchmove", () => setFollow(false), { passive: true });
window.addEventListener("keydown", (event) => {
  if (["ArrowUp", "PageUp", "Home"].includes(event.key)) setFollow(false);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { j: 1, k: -1 }[event.key];
  if (!step || !cells.children.length) return;
  const all = [...cells.children];
  const at = all.indexOf(document.activeElement.closest("article"));
  const to = at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + step, 0), all.length - 1);
  setFollow(false);
  all[to].focus();
  all[to].scrollIntoView({ block: "nearest" });
});
