package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// exclusion is what one pod leaves out of redirection, and what of it cannot be understood.
type exclusion struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	// Captured tells whether the pod is in the mesh now.
	Captured bool   `json:"captured"`
	LeftOut  string `json:"leftOut,omitempty"`
	Invalid  string `json:"invalid,omitempty"`
}

func (s *session) exclusions() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "exclusions",
		Short: "Show which pods leave traffic out of the mesh by annotations",
		Args:  cobra.NoArgs,
		Example: `  fairlead exclusions -n shop
  fairlead exclusions -A -o yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			found, err := s.findExclusions(cmd.Context(), all)
			if err != nil {
				return err
			}
			t := table{header: []string{"NAMESPACE", "POD NAME", "CAPTURED", "LEFT OUT", "INVALID"}}
			for _, x := range found {
				t.rows = append(t.rows, []string{x.Namespace, x.Pod, fmt.Sprint(x.Captured), dash(x.LeftOut), dash(x.Invalid)})
			}
			return s.print(found, t)
		},
	}
	s.outputFlag(c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of every namespace")
	return c
}

// findExclusions reads the annotations of pods and namespaces as the nodes' agents do. What an agent's own setting leaves
// out is not an annotation's doing, and is not shown.
func (s *session) findExclusions(ctx context.Context, all bool) ([]exclusion, error) {
	c, err := s.connect()
	if err != nil {
		return nil, err
	}
	namespace := c.namespace
	if all {
		namespace = metav1.NamespaceAll
	}
	namespaces, err := c.kubernetes.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	inherited := map[string]map[string]string{}
	for _, n := range namespaces.Items {
		inherited[n.Name] = n.Annotations
	}
	pods, err := c.kubernetes.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	found := []exclusion{}
	for _, p := range pods.Items {
		left, errs := mesh.ParseExclusions(p.Annotations, inherited[p.Namespace], true)
		if left.IsZero() && len(errs) == 0 {
			continue
		}
		x := exclusion{Namespace: p.Namespace, Pod: p.Name, LeftOut: left.String()}
		x.Captured = p.Annotations["ambient.istio.io/redirection"] == "enabled"
		if len(errs) > 0 {
			x.Invalid = strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "; ")
		}
		found = append(found, x)
	}
	slices.SortFunc(found, func(a, b exclusion) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod))
	})
	return found, nil
}
