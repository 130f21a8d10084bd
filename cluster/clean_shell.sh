#!/usr/bin/env bash
# The first shell on a login node (cluster/clean_shell.py): copies the environment of a login, and
# becomes the shell that runs a script. Until then the session's streams are not touched.
: "${script:?bash, to be run}" "${slow:?seconds}" "${limit:?seconds}"
: "${modules?bash, that loads modules in the login shell}"

# ---- a login shell beside this one ----
# It hands over its environment, and exits without running traps or logout files. The backslash
# bypasses aliases, and `builtin` bypasses functions.
# shellcheck disable=SC2016  # the login shell expands it
hand_over='
\unset -f builtin
\builtin trap - DEBUG ERR RETURN EXIT
{ \builtin printf "umask %s\0" "$(\builtin umask)"
\builtin printf "limits %s\0" "$(\builtin ulimit -S -a)"
\builtin command env -0
\builtin printf "done\0"
} >&61
\builtin exec true
'
exec 60< <(exec "$BASH" -lc "$modules$hand_over" 61>&1 >&2 </dev/null)
login=${!:-}
for file in ~/.bash_profile ~/.bash_login ~/.profile /etc/profile; do
  if [[ -r $file ]]; then break; fi
done
if [[ $file != /etc/profile ]]; then file+=', or /etc/profile'; fi
if [[ -n $modules ]]; then file+=', or a module of site.toml'; fi
refuse() {
  printf 'error: %s: %s\n' "$HOSTNAME" "$*" >&2
  exit 2
}
words=() is_slow='' wait=$slow
while true; do
  if IFS= read -r -d '' -t "$wait" -u 60 word; then
    case $word in
    done) break ;;
    'module '*)
      refuse "${word#module } could not be loaded, the reason is above; see modules in [ssh] of" \
        'site.toml'
      ;;
    esac
    words+=("$word")
  elif (($? <= 128)); then
    # shellcheck disable=SC2016  # for the user to type as it is
    refuse "a login file ($file) exits or execs another program, so nothing was started; guard" \
      'that line with [[ $- == *i* ]] &&'
  elif [[ -z $is_slow ]]; then
    printf 'note: %s: a login file (%s) has not finished after %s s\n' "$HOSTNAME" "$file" "$slow" >&2
    is_slow=yes wait=$limit
  else
    if [[ -n $login ]]; then kill "$login"; fi
    refuse "a login file ($file) did not finish, so nothing was started; to see what it waits for:" \
      "make ssh CMD='bash -lxc true'"
  fi
done

# ---- its environment, umask and limits ----
drop=()
for word in "${words[@]}"; do
  name=${word%%=*}
  case $name in
  'umask '*) umask "${word#umask }" ;;
  'limits '*)
    # As in "(kbytes, -s) 8192"; a limit that cannot be raised here was not raised by a login file.
    while IFS= read -r line; do
      if [[ $line =~ -([a-zA-Z])\)\ +([^ ]+)$ ]]; then
        ulimit -S "-${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
      fi
    done <<<"${word#limits }" 2>/dev/null
    ;;
  # Variables that make bash read a file, import a function, or behave differently.
  BASH* | SHELLOPTS | ENV | CDPATH | GLOBIGNORE | POSIXLY_CORRECT | IFS | TMOUT) drop+=(-u "$name") ;;
  # This shell has its own.
  EUID | UID | PPID | PWD | OLDPWD | SHLVL | _) ;;
  *)
    if [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then export "${word?}"; else drop+=(-u "$name"); fi
    ;;
  esac
done
exec env "${drop[@]}" "$BASH" --noprofile --norc -p -c "$script" 60<&-
