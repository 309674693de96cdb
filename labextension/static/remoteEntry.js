// Says in JupyterLab what the start of a kernel waits for, such as a place in Slurm's queue, and why a kernel on
// another machine has ended. Written by hand: it imports nothing, so it needs no bundler.
'use strict';

{
  const EVENTS = 'https://events.jupyter.org/jupyter_server/kernel_actions/v1';

  function activate(app) {
    // The notification of each start that waits.
    const shown = new Map();
    const notify = (type, message) =>
      app.commands.execute('apputils:notify', { message, type, options: { autoClose: false } });

    app.serviceManager.events.stream.connect((_, event) => {
      if (event.schema_id !== EVENTS || !app.commands.hasCommand('apputils:notify')) {
        return;
      }
      const { action, kernel_id: kernel, msg: message, status } = event;
      const waiting = shown.get(kernel);
      // The server's own events, of what is over, have a status.
      if (status === undefined && action === 'start') {
        if (waiting === undefined) {
          shown.set(kernel, notify('in-progress', message));
        } else {
          const command = 'apputils:update-notification';
          void waiting.then(id => app.commands.execute(command, { id, message, type: 'in-progress' }));
        }
        return;
      }
      if (status === undefined && action === 'shutdown') {
        void notify('error', message);
      }
      if (waiting !== undefined && action !== 'interrupt') {
        shown.delete(kernel);
        void waiting.then(id => app.commands.execute('apputils:dismiss-notification', { id }));
      }
    });
  }

  const plugin = { id: 'curve-kernel:progress', autoStart: true, activate };
  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB['curve-kernel'] = {
    init: () => {},
    get: async () => () => ({ __esModule: true, default: plugin })
  };
}
