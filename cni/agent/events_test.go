package agent

import (
	"strings"
	"testing"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

func TestReadEventRefusesWhatCannotBeRight(t *testing.T) {
	const good = `{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"app","PodUID":"0c6e1cc9-2ed5-4c5c-8cf6-6c4a6a2bd9d7","ContainerID":"abc_1.2","IPs":[{"Address":"10.0.0.1/24"}]}`
	if _, err := readEvent(strings.NewReader(good)); err != nil {
		t.Fatalf("a good event: %v", err)
	}
	for name, change := range map[string][2]string{
		"not JSON":                {good, "cmdadd"},
		"empty":                   {good, ""},
		"another shape":           {good, `[1,2]`},
		"no pod":                  {`"web-0"`, `""`},
		"no namespace":            {`"app"`, `""`},
		"a path for a name":       {`"web-0"`, `"../../etc/passwd"`},
		"a path for a UID":        {"0c6e1cc9-2ed5-4c5c-8cf6-6c4a6a2bd9d7", "../x"},
		"a dotted UID":            {"0c6e1cc9-2ed5-4c5c-8cf6-6c4a6a2bd9d7", ".."},
		"a long UID":              {"0c6e1cc9-2ed5-4c5c-8cf6-6c4a6a2bd9d7", strings.Repeat("a", 65)},
		"a newline in a name":     {`"web-0"`, `"web\n0"`},
		"a quote in a container":  {"abc_1.2", `abc\"`},
		"a long name":             {`"web-0"`, `"` + strings.Repeat("a", 254) + `"`},
		"a relative namespace":    {"/var/run/netns/cni-1", "netns/cni-1"},
		"a way up in a namespace": {"/var/run/netns/cni-1", "/var/run/netns/../../../etc/shadow"},
		"addresses of a shape":    {`[{"Address":"10.0.0.1/24"}]`, `"10.0.0.1"`},
	} {
		t.Run(name, func(t *testing.T) {
			bad := strings.Replace(good, change[0], change[1], 1)
			if bad == good {
				t.Fatal("the event was not changed")
			}
			if event, err := readEvent(strings.NewReader(bad)); err == nil {
				t.Errorf("%s was taken as %+v", bad, event)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	for name, tc := range map[string]struct {
		in   []string
		want int
	}{
		"dual stack":       {[]string{"10.0.0.1/24", "fd00::1/64"}, 2},
		"none":             {nil, 0},
		"no prefix":        {[]string{"10.0.0.1"}, 0},
		"loopback":         {[]string{"127.0.0.1/8"}, 0},
		"multicast":        {[]string{"224.0.0.1/4"}, 0},
		"unspecified":      {[]string{"0.0.0.0/0"}, 0},
		"mapped loopback":  {[]string{"::ffff:127.0.0.1/128"}, 0},
		"link local":       {[]string{"fe80::1/64"}, 0},
		"nine":             {strings.Fields(strings.Repeat("10.0.0.1/24 ", 9)), 0},
		"a good and a bad": {[]string{"10.0.0.1/24", "x"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var configs []plugin.IPConfig
			for _, a := range tc.in {
				configs = append(configs, plugin.IPConfig{Address: a})
			}
			got, err := addresses(configs)
			if len(got) != tc.want || (err == nil) != (tc.want > 0) {
				t.Errorf("got %v, %v; want %d addresses", got, err, tc.want)
			}
		})
	}
}
