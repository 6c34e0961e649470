package runc

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBundleOf(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--root", "/r", "create", "--bundle", "/b", "id"}, "/b"},
		{[]string{"run", "-b", "/b", "id"}, "/b"},
		{[]string{"create", "--bundle=/b", "id"}, "/b"},
		{[]string{"create", "id"}, "."},
		{[]string{"kill", "--bundle", "/b"}, ""},
	} {
		if got := bundleOf(c.args); got != c.want {
			t.Errorf("%v: got %q, want %q", c.args, got, c.want)
		}
	}
}

func TestDropLimits(t *testing.T) {
	out, err := dropLimits([]byte(`{"process":{"args":["x"]},"linux":{"cgroupsPath":"/p","resources":{"cpu":{"shares":2},"memory":{},"pids":{},"unified":{},"devices":[{"allow":false}]}}}`))
	if err != nil {
		t.Fatal(err)
	}
	var got any
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"process": map[string]any{"args": []any{"x"}}, "linux": map[string]any{"cgroupsPath": "/p",
		"resources": map[string]any{"devices": []any{map[string]any{"allow": false}}}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if _, err := dropLimits([]byte("{")); err == nil {
		t.Error("accepted broken JSON")
	}
}
