# bash completion of mailcloakctl; its words are compared with the program's by tests/test_completion.py

_mailcloakctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} index command='' words='' options='--config --db --json --help'
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${COMP_WORDS[index]} in
            --config | --db | --owner | --expires | --user | --method | --prometheus | --postfix-config | --dovecot-config) ((index++)) ;; # and its value
            -*) ;;
            *) command+=${command:+ }${COMP_WORDS[index]} ;;
        esac
    done
    case ${COMP_WORDS[COMP_CWORD - 1]} in
        --config | --db | --prometheus | --dovecot-config) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        --postfix-config) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        --method) words='XOAUTH2 OAUTHBEARER PLAIN LOGIN' options='' command='' ;;
        --expires) words='never 30d 90d 365d' options='' command='' ;;
        --owner | --user) return ;;
    esac
    case $command in
        '') [[ -n $words ]] || { words='aliases apps ask status doctor flush'; options+=' --version'; } ;;
        aliases) words='add list del enable disable' ;;
        apps) words='add set list allow disallow del enable disable' ;;
        ask) words='recipient sender alias' ;;
        'aliases add'*) options+=' --replace --force' ;;
        'apps add'*) options+=' --token-stdin --generate --owner --expires' ;;
        'apps set'*) options+=' --owner --expires' ;;
        'ask sender'*) options+=' --user --method' ;;
        status*) options+=' --watch --prometheus' ;;
        doctor*) options+=' --postfix-config --dovecot-config' ;;
    esac
    [[ $cur != -* ]] || words=$options
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _mailcloakctl mailcloakctl
