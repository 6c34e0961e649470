// Package cli is the command line `fairlead`: waypoints, and what node proxies know, as tables for people and as JSON or
// YAML for programs. The verbs and flags are those of istioctl, so that habits need not change.
package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
	"sigs.k8s.io/yaml"
)

// session is what every command shares: the flags that say which cluster and how to print.
type session struct {
	out        io.Writer
	kubeconfig string
	context    string
	namespace  string
	system     string
	output     string
	// connect finds the way to the cluster that the flags say.
	connect func() (*clients, error)
}

// New is the whole command tree; what it prints goes to out.
func New(version string, out io.Writer) *cobra.Command {
	s := &session{out: out}
	s.connect = s.dial
	return s.command(version)
}

func (s *session) command(version string) *cobra.Command {
	root := &cobra.Command{
		Use:           "fairlead",
		Short:         "Manage waypoints and look inside the mesh",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&s.kubeconfig, "kubeconfig", "", "kubeconfig file (default: $KUBECONFIG, then ~/.kube/config)")
	flags.StringVar(&s.context, "context", "", "context of the kubeconfig")
	flags.StringVarP(&s.namespace, "namespace", "n", "", "namespace (default: the context's)")
	flags.StringVar(&s.system, "system-namespace", "istio-system", "namespace Fairlead is installed in")
	root.AddCommand(s.waypoint(), s.ztunnelConfig(), s.exclusions(), s.version(version))
	return root
}

// config reads the kubeconfig the way kubectl does.
func (s *session) config() clientcmd.ClientConfig {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = s.kubeconfig
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: s.context})
}

// clients are the ways to the API server.
type clients struct {
	kubernetes kubernetes.Interface
	gateway    gateway.Interface
	namespace  string
	// get fetches a path of a pod's admin interface.
	get func(ctx context.Context, namespace, pod, path string) ([]byte, error)
}

func (s *session) dial() (*clients, error) {
	config, err := s.config().ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig (choose one with --kubeconfig or $KUBECONFIG): %w", err)
	}
	c := &clients{namespace: s.namespace}
	if c.namespace == "" {
		if c.namespace, _, err = s.config().Namespace(); err != nil {
			return nil, fmt.Errorf("read the context's namespace (choose one with -n): %w", err)
		}
	}
	if c.kubernetes, err = kubernetes.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make a Kubernetes client: %w", err)
	}
	if c.gateway, err = gateway.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make a Gateway API client: %w", err)
	}
	c.get = (&forwarder{rest: config, kubernetes: c.kubernetes}).get
	return c, nil
}

// outputFlag is for commands that print objects.
func (s *session) outputFlag(c *cobra.Command) {
	c.Flags().StringVarP(&s.output, "output", "o", "table", "table, json or yaml")
}

// table is a header and its rows.
type table struct {
	header []string
	rows   [][]string
}

// print writes objects as asked for; t is their table.
func (s *session) print(objects any, t table) error {
	switch s.output {
	case "json":
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		return e.Encode(objects)
	case "yaml":
		b, err := yaml.Marshal(objects)
		if err != nil {
			return err
		}
		_, err = s.out.Write(b)
		return err
	case "table", "short", "":
		w := tabwriter.NewWriter(s.out, 0, 0, 3, ' ', 0)
		for _, row := range append([][]string{t.header}, t.rows...) {
			fmt.Fprintln(w, strings.TrimRight(strings.Join(row, "\t"), "\t"))
		}
		return w.Flush()
	}
	return fmt.Errorf("output %q: want table, json or yaml", s.output)
}

// dash shows an empty cell as such.
func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
