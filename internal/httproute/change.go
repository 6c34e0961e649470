package httproute

import (
	"net"
	"regexp"
	"strconv"
	"strings"
)

// Field is a header to write.
type Field struct{ Name, Value string }

// Change is what happens to the headers of a request and of its response: first Remove, then Set, then Add.
type Change struct {
	Request, Response Headers
}

// Headers changes one set of headers. Set replaces what was there, Add keeps it.
type Headers struct {
	Set, Add []Field
	Remove   []string
}

// Empty tells whether nothing changes.
func (h *Headers) Empty() bool { return len(h.Set) == 0 && len(h.Add) == 0 && len(h.Remove) == 0 }

// Rewrite changes host and path of a forwarded request. Empty fields change nothing.
type Rewrite struct {
	Host string
	PathChange
}

// PathChange replaces a path: all of it by Full, the prefix that the route matched by Prefix, or what Regex matches by
// Substitution (with $1 for groups, as in regexp.Expand). At most one of them is set.
type PathChange struct {
	Full         string
	Prefix       string
	Regex        *regexp.Regexp
	Substitution string
}

// Apply gives the new path. matched is the match of the route; its path must be a prefix for a prefix to be replaced.
func (c PathChange) Apply(path string, matched *Match) string {
	switch {
	case c.Full != "":
		return c.Full
	case c.Prefix != "" && matched.Path.Kind == Prefix:
		rest := strings.TrimPrefix(path, strings.TrimSuffix(matched.Path.Value, "/"))
		if joined := strings.TrimSuffix(c.Prefix, "/") + rest; joined != "" {
			return joined
		}
		return "/"
	case c.Regex != nil:
		return c.Regex.ReplaceAllString(path, c.Substitution)
	default:
		return path
	}
}

// Redirect answers with another place. Empty fields keep what the request has.
type Redirect struct {
	Scheme string
	Host   string
	Port   uint16
	Path   PathChange
	// Status is 301 unless told otherwise.
	Status int
}

// Location is the URL that a redirect sends the request to. scheme and port are those the request came by; a port that
// its scheme implies is left out.
func (d *Redirect) Location(r *Request, matched *Match, scheme string, port uint16) string {
	host := r.Host
	if h, p, err := net.SplitHostPort(r.Host); err == nil {
		host = h
		if n, err := strconv.ParseUint(p, 10, 16); err == nil {
			port = uint16(n)
		}
	}
	if d.Host != "" {
		host = d.Host
	}
	if d.Scheme != "" {
		scheme = d.Scheme
		port = wellKnown(scheme, port)
	}
	if d.Port != 0 {
		port = d.Port
	}
	if port != 0 && port != wellKnown(scheme, 0) {
		host = net.JoinHostPort(host, strconv.Itoa(int(port)))
	} else if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		host = "[" + host + "]"
	}
	to := scheme + "://" + host + d.Path.Apply(r.Path, matched)
	if r.RawQuery != "" {
		to += "?" + r.RawQuery
	}
	return to
}

func wellKnown(scheme string, otherwise uint16) uint16 {
	switch scheme {
	case "http":
		return 80
	case "https":
		return 443
	default:
		return otherwise
	}
}
