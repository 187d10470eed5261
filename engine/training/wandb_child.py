"""The process that talks to Weights & Biases: started by wandb_run.py, which describes it.

stdin: a file to which the training appends lines of JSON: the arguments of wandb.init, then a message for each epoch.
"""

import json
import os
import sys
import threading
import time

TRAINING, FOLDER, *WHY_OFFLINE = sys.argv[1:]
OFFLINE = os.environ | {"WANDB_MODE": "offline"}  # before wandb adds to it


def tell(text):
    clear = "\r\033[K" if os.isatty(1) else ""  # a progress bar
    os.write(1, f"{clear}Weights & Biases: {text}\n".encode())


sys.path.pop(0)  # the folder of this file: wandb must not find the modules in it
try:
    import wandb

    arguments = json.loads(sys.stdin.readline())
    if os.environ["WANDB_MODE"] == "offline":
        del arguments["settings"]["init_timeout"]  # it is for networks; a busy machine may need longer
    run = wandb.init(**arguments)
except Exception as error:  # also where no API key is configured
    reason = f" ({(str(error) or type(error).__name__).splitlines()[0]})"
    if os.environ["WANDB_MODE"] == "offline":
        tell(f"not used{reason}")
        os._exit(0)
    os.lseek(0, 0, os.SEEK_SET)  # start again
    os.execve(sys.executable, [sys.executable, *sys.argv, reason], OFFLINE)
tell(run.url or f"offline{''.join(WHY_OFFLINE)}; to upload it later: wandb sync {FOLDER}/offline-run-*")
exit_code = None
while exit_code is None:
    killed = os.getppid() != int(TRAINING)  # asked first: what the training sent before its end is still read
    if line := sys.stdin.readline():
        message = json.loads(line)
        if "histogram" in message:
            message["row"]["latent_weights"] = wandb.Histogram(np_histogram=message["histogram"])
        if "row" in message:
            run.log(message["row"], step=message["row"]["epoch"])
        run.summary.update(message.get("summary", {}))
        exit_code = message.get("exit_code")
    elif killed:
        exit_code = 1
    else:
        time.sleep(0.1)
threading.Timer(10, os._exit, [1]).start()  # finish() may wait for the network
run.finish(exit_code=exit_code)
os._exit(0)  # wandb's exit handlers may wait too
