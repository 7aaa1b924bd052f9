// A page that is opened from a folder may not start workers, and the site's search is one. There it runs in a hidden
// frame of the page instead. On a server the browser's own workers are used.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame.srcdoc =
        "<body><script>postMessage = (data) => frameElement.answer(data)</script>" +
        `<script src="${new URL(address, document.baseURI).href.replaceAll('"', "%22")}"></script>`;
      this.started = new Promise((done) => this.frame.addEventListener("load", done, { once: true }));
      document.body.append(this.frame);
    }
    async postMessage(data) {
      await this.started;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
