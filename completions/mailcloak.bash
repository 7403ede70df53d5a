# bash completion of mailcloak; its words are compared with the program's by tests/test_completion.py

_mailcloak() {
    local cur=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    case $cur in
        -*) mapfile -t COMPREPLY < <(compgen -W '--config --check-config --version --help' -- "$cur") ;;
        *) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;; # CONFIG, and the FILE of --config
    esac
}

complete -o filenames -F _mailcloak mailcloak
