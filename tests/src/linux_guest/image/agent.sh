#!/bin/sh
# The only service of the test guest: runs scripts that come over the second serial port, each in the background, and
# sends what they write and how they end. `LinuxGuest` is the other side.
#
#   to the guest      run NUMBER, the lines of a script, end NUMBER
#                     shell ROWS COLUMNS TERMINAL
#   from the guest    ready RELEASE         it listens
#                     NUMBER|TEXT           a line of output
#                     NUMBER=STATUS         the script has ended
printf '\nready %s\n' "$(uname -r)"

run_script() {
    # Not sed: it would keep the lines until it has many.
    { sh "/tmp/$1.sh" </dev/null 2>&1; echo $? >"/tmp/$1.status"; } |
        while IFS= read -r text || [ -n "$text" ]; do
            printf '%s|%s\n' "$1" "$text"
        done
    printf '%s=%s\n' "$1" "$(cat "/tmp/$1.status")"
    rm -f "/tmp/$1.sh" "/tmp/$1.status"
}

while IFS= read -r line; do
    case $line in
    "run "*)
        number=${line#run }
        echo '. /etc/functions' >"/tmp/$number.sh"
        while IFS= read -r line && [ "$line" != "end $number" ]; do
            printf '%s\n' "$line" >>"/tmp/$number.sh"
        done
        # A grandchild, which init takes over: when a child of its own ends, this shell's `read` starts again and
        # forgets the part of a line that it has.
        (run_script "$number" &)
        ;;
    "shell "*)
        # A shell on this port, for a person. The guest ends with it.
        set -- $line
        stty -F /dev/ttyS1 sane rows "$2" columns "$3"
        TERM=$4 PS1='guest:\w# ' ENV=/etc/functions setsid -c sh 2>&1
        umount -a -r 2>/dev/null
        poweroff -f
        ;;
    esac
done
