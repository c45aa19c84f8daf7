# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_ftctl_global_optspecs
    string join \n session json h/help V/version
end

function __fish_ftctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_ftctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_ftctl_using_subcommand
    set -l cmd (__fish_ftctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c ftctl -n "__fish_ftctl_needs_command" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_needs_command" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_needs_command" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_needs_command" -s V -l version -d 'Print version'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "list" -d 'List the machines'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "status" -d 'Show a machine and its pair'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "start" -d 'Start a machine'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "shutdown" -d 'Press a machine\'s power button'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "reset" -d 'Press a machine\'s reset button'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "pause" -d 'Let a machine stand still'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "resume" -d 'Let a paused machine go on'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "destroy" -d 'Cut a machine\'s power'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "protect" -d 'Turn fault tolerance on: make a running machine a primary'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "unprotect" -d 'Turn fault tolerance off'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "back" -d 'Define and start the backup of a primary on another host'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "move-backup" -d 'Have another host start the backup in the place of the one that has it'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "failover" -d 'Switch a protected machine over to its backup'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "restart-backup" -d 'Let the backup give up and join anew'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "events" -d 'Print what happens, until interrupted'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "define" -d 'Define a machine'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "undefine" -d 'Remove a machine\'s definition'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "check" -d 'Find out whether this host is fit for fault tolerance, alone or together with a peer'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "host" -d 'Show what this host has'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "peers" -d 'Show the other hosts'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "maintenance" -d 'Give all machines away so that this host can be switched off, and wait until none is left'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "cert" -d 'Make the certificates by which hosts know each other'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "completions" -d 'Print the completions of a shell'
complete -c ftctl -n "__fish_ftctl_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ftctl -n "__fish_ftctl_using_subcommand list" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand list" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand list" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand status" -l watch -d 'Keep showing, twice a second, until interrupted'
complete -c ftctl -n "__fish_ftctl_using_subcommand status" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand status" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand status" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand start" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand start" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand start" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand shutdown" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand shutdown" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand shutdown" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand reset" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand reset" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand reset" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand pause" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand pause" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand pause" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand resume" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand resume" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand resume" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand destroy" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand destroy" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand destroy" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand protect" -l listen -d 'Where the backup connects' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand protect" -l lock -d 'The lock\'s path' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand protect" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand protect" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand protect" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand unprotect" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand unprotect" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand unprotect" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand back" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand back" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand back" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand move-backup" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand move-backup" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand move-backup" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand failover" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand failover" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand failover" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand restart-backup" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand restart-backup" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand restart-backup" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand events" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand events" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand events" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand define" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand define" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand define" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand undefine" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand undefine" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand undefine" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l lock-dir -d 'Where the images and their lock are: the shared storage' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l peer -d 'A peer of ftvmd.conf: both services measure and race; or else a primary that is to be reached' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l memory -d 'The memory of the machine, in MiB' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l port -d 'The port of the logging channel' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l firmware -d 'The firmware' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand check" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand host" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand host" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand host" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand peers" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand peers" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand peers" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand maintenance" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand maintenance" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand maintenance" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -f -a "ca" -d 'Make the authority: ca.crt for every host, ca.key for nobody'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -f -a "host" -d 'Make a host\'s certificate by the authority in DIR: NAME.crt and NAME.key'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and not __fish_seen_subcommand_from ca host help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from ca" -l dir -d 'Where the files are and go' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from ca" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from ca" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from ca" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from host" -l dir -d 'Where the files are and go' -r
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from host" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from host" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from host" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from help" -f -a "ca" -d 'Make the authority: ca.crt for every host, ca.key for nobody'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from help" -f -a "host" -d 'Make a host\'s certificate by the authority in DIR: NAME.crt and NAME.key'
complete -c ftctl -n "__fish_ftctl_using_subcommand cert; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ftctl -n "__fish_ftctl_using_subcommand completions" -l session -d 'Use the session bus instead of the system bus'
complete -c ftctl -n "__fish_ftctl_using_subcommand completions" -l json -d 'Print JSON'
complete -c ftctl -n "__fish_ftctl_using_subcommand completions" -s h -l help -d 'Print help'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "list" -d 'List the machines'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "status" -d 'Show a machine and its pair'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "start" -d 'Start a machine'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "shutdown" -d 'Press a machine\'s power button'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "reset" -d 'Press a machine\'s reset button'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "pause" -d 'Let a machine stand still'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "resume" -d 'Let a paused machine go on'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "destroy" -d 'Cut a machine\'s power'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "protect" -d 'Turn fault tolerance on: make a running machine a primary'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "unprotect" -d 'Turn fault tolerance off'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "back" -d 'Define and start the backup of a primary on another host'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "move-backup" -d 'Have another host start the backup in the place of the one that has it'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "failover" -d 'Switch a protected machine over to its backup'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "restart-backup" -d 'Let the backup give up and join anew'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "events" -d 'Print what happens, until interrupted'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "define" -d 'Define a machine'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "undefine" -d 'Remove a machine\'s definition'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "check" -d 'Find out whether this host is fit for fault tolerance, alone or together with a peer'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "host" -d 'Show what this host has'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "peers" -d 'Show the other hosts'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "maintenance" -d 'Give all machines away so that this host can be switched off, and wait until none is left'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "cert" -d 'Make the certificates by which hosts know each other'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "completions" -d 'Print the completions of a shell'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and not __fish_seen_subcommand_from list status start shutdown reset pause resume destroy protect unprotect back move-backup failover restart-backup events define undefine check host peers maintenance cert completions help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and __fish_seen_subcommand_from cert" -f -a "ca" -d 'Make the authority: ca.crt for every host, ca.key for nobody'
complete -c ftctl -n "__fish_ftctl_using_subcommand help; and __fish_seen_subcommand_from cert" -f -a "host" -d 'Make a host\'s certificate by the authority in DIR: NAME.crt and NAME.key'
