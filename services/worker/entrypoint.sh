#!/bin/bash
# What every command in a worker's container runs under: CANN's variables where the image has CANN, then the command.
# DEEPFLOW_ASCEND_HOME is where CANN and the driver lie. CANN's own script reads variables that may not be set.
ascend="${DEEPFLOW_ASCEND_HOME:-/usr/local/Ascend}"
for script in "$ascend"/ascend-toolkit/set_env.sh "$ascend"/cann/set_env.sh; do
    if [ -r "$script" ]; then
        source "$script"
        break
    fi
done
# The driver is the host's, mounted; a base image need not name its libraries.
for folder in "$ascend"/driver/lib64/common "$ascend"/driver/lib64/driver; do
    if [ -d "$folder" ]; then
        export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
done
# torch would load torch-npu by itself; the device's module does, where it is wanted.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
exec "$@"
