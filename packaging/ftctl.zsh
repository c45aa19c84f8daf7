#compdef ftctl

autoload -U is-at-least

_ftctl() {
    typeset -A opt_args
    typeset -a _arguments_options
    local ret=1

    if is-at-least 5.2; then
        _arguments_options=(-s -S -C)
    else
        _arguments_options=(-s -C)
    fi

    local context curcontext="$curcontext" state line
    _arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
'-V[Print version]' \
'--version[Print version]' \
":: :_ftctl_commands" \
"*::: :->ftctl" \
&& ret=0
    case $state in
    (ftctl)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:ftctl-command-$line[1]:"
        case $line[1] in
            (list)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(status)
_arguments "${_arguments_options[@]}" : \
'--watch[Keep showing, twice a second, until interrupted]' \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(start)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(shutdown)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(reset)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(pause)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(resume)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(destroy)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(protect)
_arguments "${_arguments_options[@]}" : \
'--listen=[Where the backup connects]:ADDR:PORT:_default' \
'--lock=[The lock'\''s path]:PATH:_default' \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(unprotect)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(back)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
':peer -- The primary'\''s logging channel:_default' \
&& ret=0
;;
(move-backup)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
'::host -- A peer; without it, where there is most room:_default' \
&& ret=0
;;
(failover)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(restart-backup)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(events)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
'::name -- Only of this machine:_default' \
&& ret=0
;;
(define)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
':file -- ftvm'\''s arguments, one a line; - is standard input:_default' \
&& ret=0
;;
(undefine)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The machine:_default' \
&& ret=0
;;
(check)
_arguments "${_arguments_options[@]}" : \
'--lock-dir=[Where the images and their lock are\: the shared storage]:DIR:_default' \
'--peer=[A peer of ftvmd.conf\: both services measure and race; or else a primary that is to be reached]:HOST[:PORT]:_default' \
'--memory=[The memory of the machine, in MiB]:MIB:_default' \
'--port=[The port of the logging channel]:PORT:_default' \
'--firmware=[The firmware]:FILE:_default' \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(host)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(peers)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(maintenance)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
'::what -- on, off (take machines again) or state:(on off state)' \
&& ret=0
;;
(cert)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
":: :_ftctl__subcmd__cert_commands" \
"*::: :->cert" \
&& ret=0

    case $state in
    (cert)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:ftctl-cert-command-$line[1]:"
        case $line[1] in
            (ca)
_arguments "${_arguments_options[@]}" : \
'--dir=[Where the files are and go]:DIR:_default' \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(host)
_arguments "${_arguments_options[@]}" : \
'--dir=[Where the files are and go]:DIR:_default' \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':host -- The host, as peers name it:_default' \
'::other -- More names or addresses of it:_default' \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
":: :_ftctl__subcmd__cert__subcmd__help_commands" \
"*::: :->help" \
&& ret=0

    case $state in
    (help)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:ftctl-cert-help-command-$line[1]:"
        case $line[1] in
            (ca)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(host)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
;;
(completions)
_arguments "${_arguments_options[@]}" : \
'--session[Use the session bus instead of the system bus]' \
'--json[Print JSON]' \
'-h[Print help]' \
'--help[Print help]' \
':shell -- The shell:(bash elvish fish powershell zsh)' \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
":: :_ftctl__subcmd__help_commands" \
"*::: :->help" \
&& ret=0

    case $state in
    (help)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:ftctl-help-command-$line[1]:"
        case $line[1] in
            (list)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(status)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(start)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(shutdown)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(reset)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(pause)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(resume)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(destroy)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(protect)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(unprotect)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(back)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(move-backup)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(failover)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(restart-backup)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(events)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(define)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(undefine)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(check)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(host)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(peers)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(maintenance)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(cert)
_arguments "${_arguments_options[@]}" : \
":: :_ftctl__subcmd__help__subcmd__cert_commands" \
"*::: :->cert" \
&& ret=0

    case $state in
    (cert)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:ftctl-help-cert-command-$line[1]:"
        case $line[1] in
            (ca)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(host)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
(completions)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
}

(( $+functions[_ftctl_commands] )) ||
_ftctl_commands() {
    local commands; commands=(
'list:List the machines' \
'status:Show a machine and its pair' \
'start:Start a machine' \
'shutdown:Press a machine'\''s power button' \
'reset:Press a machine'\''s reset button' \
'pause:Let a machine stand still' \
'resume:Let a paused machine go on' \
'destroy:Cut a machine'\''s power' \
'protect:Turn fault tolerance on\: make a running machine a primary' \
'unprotect:Turn fault tolerance off' \
'back:Define and start the backup of a primary on another host' \
'move-backup:Have another host start the backup in the place of the one that has it' \
'failover:Switch a protected machine over to its backup' \
'restart-backup:Let the backup give up and join anew' \
'events:Print what happens, until interrupted' \
'define:Define a machine' \
'undefine:Remove a machine'\''s definition' \
'check:Find out whether this host is fit for fault tolerance, alone or together with a peer' \
'host:Show what this host has' \
'peers:Show the other hosts' \
'maintenance:Give all machines away so that this host can be switched off, and wait until none is left' \
'cert:Make the certificates by which hosts know each other' \
'completions:Print the completions of a shell' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'ftctl commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__back_commands] )) ||
_ftctl__subcmd__back_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl back commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert_commands] )) ||
_ftctl__subcmd__cert_commands() {
    local commands; commands=(
'ca:Make the authority\: ca.crt for every host, ca.key for nobody' \
'host:Make a host'\''s certificate by the authority in DIR\: NAME.crt and NAME.key' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'ftctl cert commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__ca_commands] )) ||
_ftctl__subcmd__cert__subcmd__ca_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl cert ca commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__help_commands] )) ||
_ftctl__subcmd__cert__subcmd__help_commands() {
    local commands; commands=(
'ca:Make the authority\: ca.crt for every host, ca.key for nobody' \
'host:Make a host'\''s certificate by the authority in DIR\: NAME.crt and NAME.key' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'ftctl cert help commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__help__subcmd__ca_commands] )) ||
_ftctl__subcmd__cert__subcmd__help__subcmd__ca_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl cert help ca commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__help__subcmd__help_commands] )) ||
_ftctl__subcmd__cert__subcmd__help__subcmd__help_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl cert help help commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__help__subcmd__host_commands] )) ||
_ftctl__subcmd__cert__subcmd__help__subcmd__host_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl cert help host commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__cert__subcmd__host_commands] )) ||
_ftctl__subcmd__cert__subcmd__host_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl cert host commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__check_commands] )) ||
_ftctl__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl check commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__completions_commands] )) ||
_ftctl__subcmd__completions_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl completions commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__define_commands] )) ||
_ftctl__subcmd__define_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl define commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__destroy_commands] )) ||
_ftctl__subcmd__destroy_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl destroy commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__events_commands] )) ||
_ftctl__subcmd__events_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl events commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__failover_commands] )) ||
_ftctl__subcmd__failover_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl failover commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help_commands] )) ||
_ftctl__subcmd__help_commands() {
    local commands; commands=(
'list:List the machines' \
'status:Show a machine and its pair' \
'start:Start a machine' \
'shutdown:Press a machine'\''s power button' \
'reset:Press a machine'\''s reset button' \
'pause:Let a machine stand still' \
'resume:Let a paused machine go on' \
'destroy:Cut a machine'\''s power' \
'protect:Turn fault tolerance on\: make a running machine a primary' \
'unprotect:Turn fault tolerance off' \
'back:Define and start the backup of a primary on another host' \
'move-backup:Have another host start the backup in the place of the one that has it' \
'failover:Switch a protected machine over to its backup' \
'restart-backup:Let the backup give up and join anew' \
'events:Print what happens, until interrupted' \
'define:Define a machine' \
'undefine:Remove a machine'\''s definition' \
'check:Find out whether this host is fit for fault tolerance, alone or together with a peer' \
'host:Show what this host has' \
'peers:Show the other hosts' \
'maintenance:Give all machines away so that this host can be switched off, and wait until none is left' \
'cert:Make the certificates by which hosts know each other' \
'completions:Print the completions of a shell' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'ftctl help commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__back_commands] )) ||
_ftctl__subcmd__help__subcmd__back_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help back commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__cert_commands] )) ||
_ftctl__subcmd__help__subcmd__cert_commands() {
    local commands; commands=(
'ca:Make the authority\: ca.crt for every host, ca.key for nobody' \
'host:Make a host'\''s certificate by the authority in DIR\: NAME.crt and NAME.key' \
    )
    _describe -t commands 'ftctl help cert commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__cert__subcmd__ca_commands] )) ||
_ftctl__subcmd__help__subcmd__cert__subcmd__ca_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help cert ca commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__cert__subcmd__host_commands] )) ||
_ftctl__subcmd__help__subcmd__cert__subcmd__host_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help cert host commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__check_commands] )) ||
_ftctl__subcmd__help__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help check commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__completions_commands] )) ||
_ftctl__subcmd__help__subcmd__completions_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help completions commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__define_commands] )) ||
_ftctl__subcmd__help__subcmd__define_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help define commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__destroy_commands] )) ||
_ftctl__subcmd__help__subcmd__destroy_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help destroy commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__events_commands] )) ||
_ftctl__subcmd__help__subcmd__events_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help events commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__failover_commands] )) ||
_ftctl__subcmd__help__subcmd__failover_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help failover commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__help_commands] )) ||
_ftctl__subcmd__help__subcmd__help_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help help commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__host_commands] )) ||
_ftctl__subcmd__help__subcmd__host_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help host commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__list_commands] )) ||
_ftctl__subcmd__help__subcmd__list_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help list commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__maintenance_commands] )) ||
_ftctl__subcmd__help__subcmd__maintenance_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help maintenance commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__move-backup_commands] )) ||
_ftctl__subcmd__help__subcmd__move-backup_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help move-backup commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__pause_commands] )) ||
_ftctl__subcmd__help__subcmd__pause_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help pause commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__peers_commands] )) ||
_ftctl__subcmd__help__subcmd__peers_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help peers commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__protect_commands] )) ||
_ftctl__subcmd__help__subcmd__protect_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help protect commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__reset_commands] )) ||
_ftctl__subcmd__help__subcmd__reset_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help reset commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__restart-backup_commands] )) ||
_ftctl__subcmd__help__subcmd__restart-backup_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help restart-backup commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__resume_commands] )) ||
_ftctl__subcmd__help__subcmd__resume_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help resume commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__shutdown_commands] )) ||
_ftctl__subcmd__help__subcmd__shutdown_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help shutdown commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__start_commands] )) ||
_ftctl__subcmd__help__subcmd__start_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help start commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__status_commands] )) ||
_ftctl__subcmd__help__subcmd__status_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help status commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__undefine_commands] )) ||
_ftctl__subcmd__help__subcmd__undefine_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help undefine commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__help__subcmd__unprotect_commands] )) ||
_ftctl__subcmd__help__subcmd__unprotect_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl help unprotect commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__host_commands] )) ||
_ftctl__subcmd__host_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl host commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__list_commands] )) ||
_ftctl__subcmd__list_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl list commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__maintenance_commands] )) ||
_ftctl__subcmd__maintenance_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl maintenance commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__move-backup_commands] )) ||
_ftctl__subcmd__move-backup_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl move-backup commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__pause_commands] )) ||
_ftctl__subcmd__pause_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl pause commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__peers_commands] )) ||
_ftctl__subcmd__peers_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl peers commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__protect_commands] )) ||
_ftctl__subcmd__protect_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl protect commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__reset_commands] )) ||
_ftctl__subcmd__reset_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl reset commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__restart-backup_commands] )) ||
_ftctl__subcmd__restart-backup_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl restart-backup commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__resume_commands] )) ||
_ftctl__subcmd__resume_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl resume commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__shutdown_commands] )) ||
_ftctl__subcmd__shutdown_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl shutdown commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__start_commands] )) ||
_ftctl__subcmd__start_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl start commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__status_commands] )) ||
_ftctl__subcmd__status_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl status commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__undefine_commands] )) ||
_ftctl__subcmd__undefine_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl undefine commands' commands "$@"
}
(( $+functions[_ftctl__subcmd__unprotect_commands] )) ||
_ftctl__subcmd__unprotect_commands() {
    local commands; commands=()
    _describe -t commands 'ftctl unprotect commands' commands "$@"
}

if [ "$funcstack[1]" = "_ftctl" ]; then
    _ftctl "$@"
else
    compdef _ftctl ftctl
fi
