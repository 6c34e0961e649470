package install

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
)

// element is one plugin's entry in a configuration list, and where its text is.
type element struct {
	kind       string
	raw        json.RawMessage
	start, end int // the text is list[start:end]
}

// list is a CNI configuration list as text, and where its plugins are in it. It is edited as text, because everything
// that is not ours must come out byte for byte as it went in.
type list struct {
	text     []byte
	elements []element
	// closing is where the plugins' closing bracket is.
	closing int
}

// parseList finds the plugins of a configuration list.
func parseList(text []byte) (*list, error) {
	l := &list{text: text, closing: -1}
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("not a JSON object: %w", errOr(err, "no opening brace"))
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return nil, err
			}
			continue
		}
		if l.closing >= 0 {
			return nil, fmt.Errorf("two lists of plugins")
		}
		if err := l.readPlugins(d); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if l.closing < 0 {
		return nil, fmt.Errorf("no list of plugins")
	}
	return l, nil
}

func (l *list) readPlugins(d *json.Decoder) error {
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return fmt.Errorf("plugins: not a list: %w", errOr(err, "no opening bracket"))
	}
	for d.More() {
		var e element
		if err := d.Decode(&e.raw); err != nil {
			return fmt.Errorf("plugins: %w", err)
		}
		var named struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(e.raw, &named); err != nil {
			return fmt.Errorf("plugins: %w", err)
		}
		e.kind, e.end = named.Type, int(d.InputOffset())
		e.start = e.end - len(e.raw)
		l.elements = append(l.elements, e)
	}
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("plugins: %w", err)
	}
	l.closing = int(d.InputOffset()) - 1
	return nil
}

// with is the list's text with entry as its last plugin and no other of entry's type; it is the same text where that is
// so already.
func (l *list) with(kind string, entry []byte) ([]byte, error) {
	if n := len(l.elements); n > 1 && l.elements[n-1].kind == kind && l.count(kind) == 1 && sameJSON(l.elements[n-1].raw, entry) {
		return l.text, nil
	}
	without, err := parseList(l.without(kind))
	if err != nil {
		return nil, err
	}
	if len(without.elements) == 0 {
		return nil, fmt.Errorf("no other plugin: one that makes the pod's interface must come first")
	}
	last := without.elements[len(without.elements)-1]
	return splice(without.text, last.end, last.end, append([]byte(","+without.separator()), entry...)), nil
}

// without is the list's text without the plugins of a type.
func (l *list) without(kind string) []byte {
	text := l.text
	// From the last to the first, so that what was found stays where it was found.
	for i := len(l.elements) - 1; i >= 0; i-- {
		if l.elements[i].kind != kind {
			continue
		}
		// A comma goes with it: the one before or, when no element is left before it, the one after.
		start, end := l.elements[i].start, l.elements[i].end
		if kept := slices.IndexFunc(l.elements, func(e element) bool { return e.kind != kind }); kept >= 0 && kept < i {
			start = l.elements[i-1].end
		} else if i+1 < len(l.elements) {
			end = l.elements[i+1].start
		}
		text = splice(text, start, end, nil)
	}
	return text
}

func (l *list) count(kind string) int {
	n := 0
	for _, e := range l.elements {
		if e.kind == kind {
			n++
		}
	}
	return n
}

// separator is the white space between the list's last two elements, or before its only one, so that ours is laid out
// as the others are.
func (l *list) separator() string {
	n := len(l.elements)
	from := l.elements[n-1].start
	begin := from
	for begin > 0 && bytes.IndexByte([]byte(" \t\r\n"), l.text[begin-1]) >= 0 {
		begin--
	}
	return string(l.text[begin:from])
}

// splice is text with the bytes from start to end replaced.
func splice(text []byte, start, end int, by []byte) []byte {
	out := make([]byte, 0, len(text)+len(by))
	return append(append(append(out, text[:start]...), by...), text[end:]...)
}

// sameJSON compares two values without regard to white space.
func sameJSON(a, b []byte) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

// listOf makes a list of a single plugin's configuration, as a runtime does when it loads one.
func listOf(conf []byte) ([]byte, error) {
	var named struct {
		Version string `json:"cniVersion"`
		Name    string `json:"name"`
		Type    string `json:"type"`
	}
	if err := json.Unmarshal(conf, &named); err != nil {
		return nil, err
	}
	if named.Type == "" {
		return nil, fmt.Errorf("names no plugin type")
	}
	head, err := json.Marshal(struct {
		Version string `json:"cniVersion,omitempty"`
		Name    string `json:"name,omitempty"`
	}{named.Version, named.Name})
	if err != nil {
		return nil, err
	}
	head = bytes.TrimSuffix(head, []byte("}"))
	if len(head) > 1 {
		head = append(head, ',')
	}
	return slices.Concat(head, []byte(`"plugins":[`), bytes.TrimSpace(conf), []byte("]}\n")), nil
}

func errOr(err error, otherwise string) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("%s", otherwise)
}
