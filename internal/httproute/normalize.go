package httproute

import "strings"

// NormalizePath makes paths that name the same resource equal, so that a policy or a route cannot be passed by spelling a
// path otherwise: escaped unreserved characters are unescaped, other escapes get upper-case digits, backslashes become
// slashes, and dot segments are resolved (RFC 3986 §6.2.2). Doubled slashes stay. ok is false for a path that does not
// begin with a slash or has a broken escape.
func NormalizePath(path string) (_ string, ok bool) {
	if path == "" || path[0] != '/' {
		return path, false
	}
	if !strings.ContainsAny(path, "%\\.") {
		return path, true
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		switch c := path[i]; c {
		case '\\':
			b.WriteByte('/')
		case '%':
			if i+2 >= len(path) {
				return path, false
			}
			hi, lo := unhex(path[i+1]), unhex(path[i+2])
			if hi < 0 || lo < 0 {
				return path, false
			}
			if decoded := byte(hi<<4 | lo); unreserved(decoded) {
				b.WriteByte(decoded)
			} else {
				b.WriteString(strings.ToUpper(path[i : i+3]))
			}
			i += 2
		default:
			b.WriteByte(c)
		}
	}
	return removeDots(b.String()), true
}

// removeDots resolves "." and ".." segments; one above the root stays at the root.
func removeDots(path string) string {
	var out []string
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		last := i == len(segments)-1
		switch s {
		case ".":
			if last {
				out = append(out, "")
			}
		case "..":
			if len(out) > 0 {
				out = out[:len(out)-1]
			}
			if last {
				out = append(out, "")
			}
		default:
			out = append(out, s)
		}
	}
	return "/" + strings.Join(out, "/")
}

func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	default:
		return -1
	}
}
