# bash completion of mailcloakctl; its words are compared with the program's by tests/test_completion.py

# The first column of a list: the addresses or app ids that are there
_mailcloakctl_names() { # NOUN
    mailcloakctl "${place[@]}" "$1" list 2>/dev/null | awk 'NR > 1 && !/^ / { print $1 }'
}

_mailcloakctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} index command='' words='' options='--config --db --json --help'
    local -a place=()
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${COMP_WORDS[index]} in
            --config | --db | --owner | --expires | --unused | --user | --method | --prometheus | --postfix-config | --dovecot-config | --format | --usernames | --max-change | --missing | --domain | --scope | --source | --go-config | --new-config) # and its value
                [[ ${COMP_WORDS[index]} != --config && ${COMP_WORDS[index]} != --db ]] || place=("${COMP_WORDS[index]}")
                [[ ${COMP_WORDS[index + 1]} != = ]] || ((index++)) # bash makes three words of --db=FILE
                ((index++))
                [[ ${#place[@]} != 1 ]] || place+=("${COMP_WORDS[index]}")
                ;;
            -*) ;;
            *) command+=${command:+ }${COMP_WORDS[index]} ;;
        esac
    done
    if [[ $cur == = ]]; then cur=''; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD - 2]}; fi
    case $prev in
        --config | --db | --prometheus | --dovecot-config | --go-config | --new-config) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        --postfix-config) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        --method) words='XOAUTH2 OAUTHBEARER PLAIN LOGIN' options='' command='' ;;
        --expires) words='never 30d 90d 365d' options='' command='' ;;
        --unused) words='30d 90d 365d' options='' command='' ;;
        --format) words='csv jsonl virtual postfixadmin' options='' command='' ;;
        --usernames) words='local address' options='' command='' ;;
        --missing) words='delete disable keep' options='' command='' ;;
        --owner | --user | --domain | --scope | --source | --max-change) return ;;
    esac
    case $command in
        '') [[ -n $words ]] || { words='aliases apps backup restore db migrate-from-go ask status doctor flush'; options+=' --version'; } ;;
        aliases) words='add add-user remove-user list show move del enable disable export import sync' ;;
        apps) words='add set list allow disallow del enable disable' ;;
        db) words='check mirror promote' ;;
        ask) words='recipient sender alias' ;;
        'aliases add') options+=' --replace --receive-only' ;;&
        'aliases add '*) options+=' --replace --receive-only' ;;&
        'aliases add'*) options+=' --external --force' ;;&
        'aliases remove-user'*) options+=' --force' ;;&
        'aliases add-user' | 'aliases remove-user') [[ $cur == -* ]] || words=$(_mailcloakctl_names aliases) ;;
        'aliases move'*) options+=' --force' ;;
        'aliases list'*) options+=' --user --domain --source --disabled --quiet --count' ;;
        'aliases show' | 'aliases del'* | 'aliases enable'* | 'aliases disable'*) [[ $cur == -* ]] || words=$(_mailcloakctl_names aliases) ;;
        'aliases export'* | 'aliases import'* | 'aliases sync'*)
            options+=' --format --usernames --skip-bad'
            [[ $command == 'aliases export'* ]] || options+=' --dry-run --max-change --scope --source --external --force --verbose'
            [[ $command != 'aliases sync'* ]] || options+=' --missing'
            [[ $cur == -* ]] || { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return; }
            ;;
        'apps add'*) options+=' --token-stdin --generate --replace --force --owner --expires' ;;
        'apps list'*) options+=' --unused' ;;
        'apps set'*) options+=' --owner --expires' ;;&
        'apps set' | 'apps allow' | 'apps disallow' | 'apps del' | 'apps enable' | 'apps disable')
            [[ $cur == -* ]] || words=$(_mailcloakctl_names apps)
            ;;
        backup* | restore*)
            [[ $command != backup* ]] || options+=' --replace'
            [[ $command != restore* ]] || options+=' --dry-run'
            [[ $cur == -* ]] || { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return; }
            ;;
        migrate-from-go*)
            options+=' --go-config --new-config --skip-bad --dry-run --force'
            [[ $cur == -* ]] || { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return; }
            ;;
        'db check'*) options+=' --fix' ;;
        'db mirror'*)
            options+=' --watch --publish --adopt'
            [[ $cur == -* ]] || { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return; }
            ;;
        'ask sender'*) options+=' --user --method' ;;
        status*) options+=' --watch --prometheus' ;;
        doctor*) options+=' --postfix-config --dovecot-config' ;;
    esac
    [[ $cur != -* ]] || words=$options
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _mailcloakctl mailcloakctl
