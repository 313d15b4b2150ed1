"use strict";
// The reader's place, which is the end as long as nobody scrolls up, and the pace of drawing.

const toLatest = document.querySelector("#to-latest");
const scroller = document.scrollingElement;
let follows = true;
let lastTop = 0;

function noticeScroll() {
  const below = scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
  if (scroller.scrollTop < lastTop && below > 1) follows = false;
  else if (below < 48) follows = true;
  lastTop = scroller.scrollTop;
  toLatest.hidden = follows || below < 240;
}

function followEnd() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  else noticeScroll();
}

function goToEnd() {
  follows = true;
  followEnd();
}

document.addEventListener("scroll", noticeScroll, { passive: true });
window.addEventListener("resize", followEnd); // a telephone's keyboard comes and goes

// Draws at most once a frame, and less often when that takes long.
const painter = {
  queued: false,
  restUntil: 0,
  ask(draw) {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame((now) => {
      this.queued = false;
      if (now < this.restUntil) {
        this.ask(draw);
        return;
      }
      const started = performance.now();
      draw();
      followEnd(); // asks for the layout, so its time counts
      const cost = performance.now() - started;
      this.restUntil = cost > 8 ? performance.now() + 3 * cost : 0;
    });
  },
};
