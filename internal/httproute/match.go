package httproute

import (
	"cmp"
	"net/url"
	"regexp"
	"strings"
)

// Kind is how a StringMatch compares.
type Kind uint8

// The kinds. The zero value matches anything.
const (
	Any Kind = iota
	Exact
	// Prefix is plain for headers and query parameters; a path's prefix ends at a path element: /a matches /a and /a/b
	// and not /ab.
	Prefix
	Suffix
	Contains
	// Regex is RE2 and must match the whole value.
	Regex
	// Present: there is a value.
	Present
)

// StringMatch matches one value.
type StringMatch struct {
	Kind       Kind
	Value      string
	IgnoreCase bool
	// Not turns the answer round.
	Not bool

	re *regexp.Regexp
}

// Compile readies a regular expression; it must be called before Matches where Kind is Regex, and does nothing elsewhere.
func (m *StringMatch) Compile() error {
	if m.Kind != Regex {
		return nil
	}
	prefix := "^(?:"
	if m.IgnoreCase {
		prefix = "(?i)" + prefix
	}
	re, err := regexp.Compile(prefix + m.Value + ")$")
	if err != nil {
		return err
	}
	m.re = re
	return nil
}

// Matches tells whether value, which exists only where present is true, fits.
func (m *StringMatch) Matches(value string, present bool) bool {
	return m.fits(value, present) != m.Not
}

func (m *StringMatch) fits(value string, present bool) bool {
	if m.Kind == Any {
		return true
	}
	if !present {
		return false
	}
	want := m.Value
	if m.IgnoreCase && m.Kind != Regex {
		value, want = strings.ToLower(value), strings.ToLower(want)
	}
	switch m.Kind {
	case Exact:
		return value == want
	case Prefix:
		return strings.HasPrefix(value, want)
	case Suffix:
		return strings.HasSuffix(value, want)
	case Contains:
		return strings.Contains(value, want)
	case Regex:
		return m.re != nil && m.re.MatchString(value)
	default:
		return true
	}
}

// NamedMatch matches a header or a query parameter.
type NamedMatch struct {
	Name string
	StringMatch
}

// Match is a conjunction. The zero value matches every request.
type Match struct {
	Path    StringMatch
	Method  string
	Headers []NamedMatch
	Query   []NamedMatch
	// GRPC: only requests whose content type is application/grpc or one of its kinds.
	GRPC bool
}

// Compile readies all regular expressions.
func (m *Match) Compile() error {
	if err := m.Path.Compile(); err != nil {
		return err
	}
	for i := range m.Headers {
		if err := m.Headers[i].Compile(); err != nil {
			return err
		}
	}
	for i := range m.Query {
		if err := m.Query[i].Compile(); err != nil {
			return err
		}
	}
	return nil
}

// Matches tells whether the request has everything the match names.
func (m *Match) Matches(r *Request) bool {
	if m.Method != "" && m.Method != r.Method {
		return false
	}
	if m.Path.Kind == Prefix {
		if !pathHasPrefix(r.Path, m.Path.Value) {
			return false
		}
	} else if !m.Path.Matches(r.Path, true) {
		return false
	}
	if m.GRPC {
		if ct, _ := r.Header("content-type"); !isGRPC(ct) {
			return false
		}
	}
	for i := range m.Headers {
		value, present := r.Header(m.Headers[i].Name)
		if !m.Headers[i].Matches(value, present) {
			return false
		}
	}
	return len(m.Query) == 0 || m.matchesQuery(r.RawQuery)
}

func (m *Match) matchesQuery(raw string) bool {
	// A pair that cannot be decoded is left out by ParseQuery and then matches nothing, which is what its error says.
	q, _ := url.ParseQuery(raw)
	for i := range m.Query {
		values, present := q[m.Query[i].Name]
		value := ""
		if present {
			value = values[0]
		}
		if !m.Query[i].Matches(value, present) {
			return false
		}
	}
	return true
}

// pathHasPrefix is the Gateway API's PathPrefix: element by element, a trailing slash of the prefix does not count.
func pathHasPrefix(path, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return strings.HasPrefix(path, prefix) && (len(path) == len(prefix) || path[len(prefix)] == '/')
}

func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// Compare orders matches as the Gateway API's precedence asks, the one to try first being less: exact path, then regex,
// then the longest prefix; then a method; then the most headers; then the most query parameters
// (https://gateway-api.sigs.k8s.io/reference/spec/#httprouterule; where regular expressions go is left to the
// implementation). Equal matches are ordered by the age and name of their routes, which a match does not know.
func Compare(a, b *Match) int {
	return cmp.Or(
		cmp.Compare(pathRank(b.Path.Kind), pathRank(a.Path.Kind)),
		cmp.Compare(len(b.Path.Value), len(a.Path.Value)),
		cmp.Compare(btoi(b.Method != ""), btoi(a.Method != "")),
		cmp.Compare(len(b.Headers), len(a.Headers)),
		cmp.Compare(len(b.Query), len(a.Query)),
	)
}

func pathRank(k Kind) int {
	switch k {
	case Exact:
		return 3
	case Regex:
		return 2
	case Prefix:
		return 1
	default:
		return 0
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
